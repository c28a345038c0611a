"""A KL autoencoder for CIFAR-10, 32 x 32 x 3 to 16 x 16 x 4 (f2), with a patch discriminator: a first stage to try.

    python -m diffussm_jax.main --config=configs/cifar10_autoencoder_kl.py --workdir=runs/cifar10_kl \\
      --config.data.path=cifar10.zip

The data is as for configs/cifar10.py. docs/autoencoder.md has a run on two CPU cores with its scores, and what to do
with the result. The perceptual distance is that of a small classifier, which is trained on the data first: no LPIPS.
"""

from diffussm_jax.config import choose, default_config


def get_config():
    config = default_config()
    choose(config, "task.name", "autoencoder")
    config.batch_size = 32
    config.num_steps = 3_500
    config.log_every = 50
    config.eval_every = 500
    config.sample_every = 500
    config.checkpoint_every = 500

    config.data.source = "images"
    config.data.eval_split = "test"
    config.data.image_size = 32
    config.data.num_channels = 3
    config.data.num_classes = 10
    config.data.random_flip = True

    autoencoder = config.task.autoencoder
    autoencoder.block_out_channels = (32, 64)
    autoencoder.layers_per_block = 1
    autoencoder.norm_num_groups = 8
    autoencoder.latent_channels = 4

    config.task.perceptual = "cifar10"
    config.task.report_features = "cifar10"
    config.task.disc_width = 32
    config.task.disc_layers = 2
    config.task.disc_start = 2_000
    config.task.disc_warmup = 250
    config.task.disc_ramp = 500

    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 100
    config.optimizer.ema_decay = 0.995
    config.optimizer.has_ema_warmup = True
    return config
