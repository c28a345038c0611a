"""DiffuSSM on CIFAR-10, class-conditional, in pixel space: 32 x 32 x 3, M = 2.

    python -m diffussm_jax.main --config=configs/cifar10.py --workdir=runs/cifar10 --config.data.path=cifar10.zip

The data is a folder, zip or tar with train/<class>/*.jpg and test/<class>/*.jpg, or a TFDS data set
(--config.data.path=tfds:cifar10) prepared as array_record. Sizes: `:S` (default), `:L` and `:XL`. An epoch of `:S` over
50,000 images takes about 23 P multiply-adds in the linear layers, forward and backward: 2 minutes on one H100 at 40 %
MFU (computed, not measured, without the SSMs).
"""

from diffussm_jax.config import apply_size, default_config


def get_config(size="S"):
    config = default_config()
    apply_size(config, size or "S")
    config.batch_size = 128
    config.num_steps = 200_000
    config.model.dtype = "bfloat16"

    config.data.source = "images"
    config.data.eval_split = "test"
    config.data.image_size = 32
    config.data.num_channels = 3
    config.data.num_classes = 10
    config.data.random_flip = True

    config.diffusion.schedule = "cosine"
    config.diffusion.clip_x_0 = True

    config.optimizer.learning_rate = 2e-4
    config.optimizer.warmup_steps = 1_000
    config.optimizer.max_grad_norm = 1.0
    return config
