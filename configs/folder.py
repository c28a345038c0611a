"""DiffuSSM on your own images, in pixel space: a folder, zip or tar, with or without a folder for each class.

    python -m diffussm_jax.main --config=configs/folder.py --workdir=runs/mine --config.data.path=FOLDER

Classes, size and channels are found in the images, and printed when training starts (`data_config`). A tenth of the
images is held out, or the folder test/ or val/ if there is one beside train/. Every choice can be made by hand, such as
`--config.data.image_size=32`. Sizes: `:XS` for a CPU, `:S` (default), `:L` and `:XL`.

A step of `:S` at batch size 128 on 64 x 64 pixels takes 21 T multiply-adds in the linear layers, forward and backward:
0.11 s on one H100 at 40 % MFU (computed, not measured, without the SSMs).
"""

from diffussm_jax.config import apply_size, default_config
from diffussm_jax.config_keys import AUTO_SPLIT, FROM_DATA


def get_config(size="S"):
    config = default_config()
    config.num_steps = 200_000
    config.eval_every = config.sample_every = config.checkpoint_every = 2_000
    if size == "XS":
        config.eval_every = config.sample_every = config.checkpoint_every = 500
        config.model.update(width=96, depth=4, scan_unroll=4)
        config.model.mixer.state_size = 16
        config.batch_size = 32
        config.optimizer.learning_rate = 1e-3
    else:
        apply_size(config, size or "S")
        config.model.dtype = "bfloat16"
        config.model.remat = "block"
        config.batch_size = 128
        config.optimizer.learning_rate = 2e-4

    config.data.source = "images"
    config.data.split = AUTO_SPLIT
    config.data.eval_split = AUTO_SPLIT
    config.data.holdout = 0.1
    config.data.image_size = FROM_DATA
    config.data.num_channels = FROM_DATA
    config.data.num_classes = FROM_DATA

    config.diffusion.schedule = "cosine"
    config.diffusion.clip_x_0 = True

    config.optimizer.warmup_steps = 500
    config.optimizer.max_grad_norm = 1.0
    config.optimizer.has_ema_warmup = True

    config.sampling.sampler = "ddim"
    config.sampling.num_steps = 50
    config.sampling.num_grid_rows = 4
    return config
