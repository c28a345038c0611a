"""Autoencoders for CIFAR-10, 32 x 32 to 16 x 16 (f2): `:kl` (default) with 4 channels, `:vq` with 512 codes of 4.

    python -m diffussm_jax.main --config=configs/cifar10_autoencoder.py:kl --workdir=runs/cifar10_kl \\
      --config.data.path=cifar10.zip

The data is as for configs/cifar10.py.
"""

from diffussm_jax.config import choose, default_config


def get_config(kind="kl"):
    config = default_config()
    choose(config, "task.name", "autoencoder")
    choose(config, "task.autoencoder.name", kind or "kl")
    config.batch_size = 32
    config.num_steps = 6_000
    config.log_every = 100
    config.eval_every = 1_000
    config.sample_every = 1_000
    config.checkpoint_every = 1_000

    config.data.source = "images"
    config.data.eval_split = "test"
    config.data.image_size = 32
    config.data.num_channels = 3
    config.data.num_classes = 10
    config.data.random_flip = True

    task, autoencoder = config.task, config.task.autoencoder
    autoencoder.block_out_channels = (32, 64)
    autoencoder.layers_per_block = 1
    autoencoder.norm_num_groups = 8
    autoencoder.latent_channels = 4
    if autoencoder.name == "vq":
        autoencoder.num_vq_embeddings = 512
        autoencoder.codebook_decay = 0.99
        autoencoder.min_usage = 0.1
    task.perceptual = "cifar10"
    task.report_features = "cifar10"
    task.disc_width = 32
    task.disc_layers = 2
    task.disc_start = 3_000
    task.disc_warmup = 500
    task.disc_ramp = 500

    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 200
    config.optimizer.max_grad_norm = 0.0
    config.optimizer.ema_decay = 0.999
    return config
