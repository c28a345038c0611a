"""ADM's U-Net on ImageNet at 64, 256 or 512 pixels: the settings of its paper (arXiv 2105.05233, appendix).

    python -m diffussm_jax.main --config=configs/adm_imagenet.py:256 --workdir=runs/adm_imagenet256 \
        --config.data.path=imagenet

The data is a folder with train/<class>/*.jpg, or as `configs/cifar10.py` says. Sizes: `:64`, `:256` (default), `:512`.
Not in here: guidance by a classifier.
Parameters, as guided-diffusion's: 295,904,454; 553,838,086; 558,997,638. Multiply-adds: 110 G, 1120 G, 1982 G. The
paper's runs take about 500, 2400 and 4100 H100-hours at 40 % MFU (computed, not measured). Its FIDs without guidance:
2.07, 10.94, 23.24.
"""

from diffussm_jax.config import apply_size, choose, default_config

# Batch size, steps, learning rate and schedule of each size.
_TRAINING = {
    "64": (2048, 540_000, 3e-4, "cosine"),
    "256": (256, 1_980_000, 1e-4, "linear"),
    "512": (256, 1_940_000, 1e-4, "linear"),
}


def get_config(size="256"):
    size = size or "256"
    if size not in _TRAINING:
        raise ValueError(f"the sizes of adm_imagenet.py are {', '.join(_TRAINING)}; got {size!r}")
    config = default_config()
    choose(config, "model.name", "unet")
    apply_size(config, f"ADM-{size}")
    config.model.dtype = "bfloat16"
    config.model.remat = "block"
    config.conditioners.label.dropout = 0.0  # above 0 for classifier-free guidance, which is not the paper's

    choose(config, "data.source", "images")
    config.data.eval_split = "val"
    config.data.image_size = int(size)
    config.data.num_channels = 3
    config.data.num_classes = 1000
    config.data.random_flip = True

    config.batch_size, config.num_steps, config.optimizer.learning_rate, schedule = _TRAINING[size]
    choose(config, "diffusion.schedule", schedule)
    config.diffusion.clip_x_0 = True
    return config
