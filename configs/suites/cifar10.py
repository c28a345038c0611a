"""Four backbones on CIFAR-10, class-conditional, in pixel space: about an hour on one GPU.

    python -m diffussm_jax.compare configs/suites/cifar10.py:cifar10.zip --workdir=runs/compare_cifar10

The argument is the data, as for configs/cifar10.py. 12 runs of 4 measured minutes each; compiling and scoring come on
top. DiffuSSM-S and DiT-S/2 are the sizes of their papers' families; DiT-S/4 has a quarter of the tokens, and the U-Net
has channels that give it about as many parameters. Expect scores far from converged ones: a run sees some hundred
epochs at most.
"""

from pathlib import Path

from diffussm_jax.compare import Budget, Suite
from diffussm_jax.config import apply_size, choose, load_config

NOTES = (
    "CIFAR-10, class-conditional, in pixel space. All backbones have about 33 M parameters. The learning rate is one "
    "value for all, and was not tuned for each. Runs are short: what is said here is about the beginning of training."
)


def config_of(model, size, path):
    config = load_config(str(Path(__file__).parents[1] / "cifar10.py"))
    choose(config, "model.name", model)
    config.model.dtype = "bfloat16"
    if size:
        apply_size(config, size)
    config.data.path = path
    config.optimizer.warmup_steps = 500
    config.optimizer.ema_decay = 0.999
    choose(config, "sampling.sampler", "dpm_solver")
    config.sampling.num_steps = 25
    return config


def get_suite(path="cifar10.zip"):
    unet = config_of("unet", None, path)
    unet.model.update(width=116, channel_mult=(1, 2, 2, 2), num_res_blocks=2, attention_resolutions=(16, 8))
    return Suite(
        title="Backbones on CIFAR-10",
        notes=NOTES,
        configs={
            "DiffuSSM-S": config_of("diffussm", "S", path),
            "DiT-S/2": config_of("dit", "S/2", path),
            "DiT-S/4": config_of("dit", "S/4", path),
            "U-Net": unet,
        },
        budget=Budget("seconds", 240),
        features="cifar10",
        num_samples=5000,
        num_scores=2,
    )
