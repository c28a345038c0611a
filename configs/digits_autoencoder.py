"""A KL autoencoder for scikit-learn's digits, upsampled to 32 x 32, to 8 x 8 x 2 (f4): the smallest first stage.

    python -m diffussm_jax.main --config=configs/digits_autoencoder.py --workdir=runs/digits_autoencoder

Takes minutes on two CPU cores. The perceptual distance is that of a small classifier, which is trained on the data
first: no LPIPS. docs/autoencoder.md says what to do with the result.
"""

from diffussm_jax.config import choose, default_config


def get_config():
    config = default_config()
    choose(config, "task.name", "autoencoder")
    config.batch_size = 32
    config.num_steps = 600
    config.log_every = 20
    config.eval_every = 200
    config.sample_every = 200
    config.checkpoint_every = 200

    config.data.image_size = 32

    autoencoder = config.task.autoencoder
    autoencoder.block_out_channels = (16, 32, 32)
    autoencoder.layers_per_block = 1
    autoencoder.norm_num_groups = 8
    autoencoder.latent_channels = 2

    config.task.perceptual = "digits"
    config.task.report_features = "digits"
    config.task.disc_width = 16
    config.task.disc_layers = 2
    config.task.disc_start = 300
    config.task.disc_warmup = 50
    config.task.disc_ramp = 100

    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 50
    config.optimizer.ema_decay = 0.99
    config.optimizer.has_ema_warmup = True
    return config
