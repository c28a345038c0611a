"""Four backbones on the digits, at equal width and depth, 60 measured seconds each.

    python -m diffussm_jax.compare configs/suites/digits.py --workdir=runs/compare_digits

Takes about 20 minutes on two CPU cores. DiffuSSM and DiT have D = 64 and four blocks, and the U-Net has channels that
give it about as many parameters, 0.33 to 0.36 M. Everything else is that of configs/digits.py, with two changes. The
learning rate is constant after the warm-up, so that runs of different length can be read at the same step: 0.003, which
was better than 0.001 for DiffuSSM, DiT/2 and the U-Net (800 steps, one seed). And samples are drawn without guidance,
whose scale was chosen for DiffuSSM.
"""

from pathlib import Path

from diffussm_jax.compare import Budget, Suite
from diffussm_jax.config import choose, load_config

NOTES = (
    "Scikit-learn's 8 x 8 digits, class-conditional, in pixel space. All backbones have 0.33 to 0.36 M parameters. The "
    "learning rate is one value for all: 0.003, which was better than 0.001 for DiffuSSM, DiT/2 and the U-Net (800 "
    "steps, one seed); no other was tried. Sequences are short here (64 positions): what is said of times holds for "
    "these sizes alone."
)


def base_config():
    config = load_config(str(Path(__file__).parents[1] / "digits.py"))
    config.optimizer.decay = "constant"
    config.sampling.guidance_scale = 1.0
    return config


def dit(patch_size):
    config = base_config()
    choose(config, "model.name", "dit")
    config.model.update(width=64, depth=4, num_heads=4, patch_size=patch_size)
    return config


def unet():
    config = base_config()
    choose(config, "model.name", "unet")
    config.model.update(width=22, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(4,), num_heads=4)
    return config


def get_suite():
    return Suite(
        title="Backbones on the digits",
        notes=NOTES,
        configs={"DiffuSSM": base_config(), "DiT/1": dit(1), "DiT/2": dit(2), "U-Net": unet()},
        budget=Budget("seconds", 60),
        num_losses=20,
        num_scores=2,
    )
