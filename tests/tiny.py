"""A config that trains in seconds."""

from diffussm_jax.config import choose, default_config


def tiny_config():
    """A class-conditional model of the digits with two narrow blocks; a dozen steps."""
    config = default_config()
    config.batch_size = 8
    config.num_steps = 12
    config.log_every = 3
    config.eval_every = 6
    config.sample_every = 6
    config.checkpoint_every = 4
    config.model.width = 16
    config.model.depth = 2
    config.model.mixer.state_size = 4
    choose(config, "diffusion.schedule", "cosine")
    config.diffusion.clip_x_0 = True
    config.optimizer.learning_rate = 1e-2
    config.optimizer.ema_decay = 0.5
    choose(config, "sampling.sampler", "ddim")
    config.sampling.num_steps = 3
    config.sampling.guidance_scale = 1.5
    config.sampling.num_grid_rows = 1
    return config


def tiny_autoencoder_config(kind="kl"):
    """An autoencoder of digits of 16 x 16 pixels to 8 x 8, with a discriminator from the fourth step on."""
    config = tiny_config()
    choose(config, "task.name", "autoencoder")
    choose(config, "task.autoencoder.name", kind)
    config.data.image_size = 16
    config.optimizer.learning_rate = 1e-3
    config.sampling.guidance_scale = 1.0
    autoencoder = config.task.autoencoder
    autoencoder.update(block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2, latent_channels=2)
    if kind == "vq":
        autoencoder.update(num_vq_embeddings=16, codebook_decay=0.9, min_usage=0.5)
    config.task.update(disc_width=4, disc_layers=1, disc_norm="group", disc_start=4, disc_warmup=2, disc_ramp=2)
    return config
