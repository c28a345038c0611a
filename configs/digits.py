"""DiffuSSM on scikit-learn's 8 x 8 handwritten digits, class-conditional, in pixel space: the smallest example.

    python -m diffussm_jax.main --config=configs/digits.py --workdir=runs/digits

Takes 2.5 to 4.5 minutes on two CPU cores. Expected: a classifier trained on real digits assigns at least 95 % of the
samples to their label (`pytest -n 0 -m slow`). Small batches and many steps work best in that time. More guidance makes
the digits clearer and less diverse.
"""

from diffussm_jax.config import choose, default_config


def get_config():
    config = default_config()
    config.batch_size = 32
    config.num_steps = 2600
    config.log_every = 50
    config.eval_every = 650
    config.sample_every = 1300
    config.checkpoint_every = 650

    config.model.width = 64
    config.model.depth = 4
    config.model.mixer.state_size = 16
    config.model.scan_unroll = 4

    config.diffusion.schedule = "cosine"
    config.diffusion.clip_x_0 = True

    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_steps = 100
    config.optimizer.decay = "cosine"
    config.optimizer.max_grad_norm = 1.0
    config.optimizer.ema_decay = 0.998
    config.optimizer.has_ema_warmup = True

    choose(config, "sampling.sampler", "dpm_solver")  # as the sweep of docs/evaluation.md picks
    config.sampling.variant = "sde_2m"
    config.sampling.time_grid = "quadratic"
    config.sampling.num_steps = 20
    config.sampling.guidance_scale = 1.2
    config.sampling.num_grid_rows = 6
    return config
