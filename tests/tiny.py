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
