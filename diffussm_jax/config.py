"""Configurations: the defaults of every key, the model sizes, the paper's settings, and the checks made before a run.

A file in `configs/` starts from `default_config()` or `paper_config()` and sets values. The command line overrides
any of them, `--config.model.depth=2`.
"""

import importlib.util
import math
from collections.abc import Mapping
from types import MappingProxyType

from ml_collections import ConfigDict

# XL is the paper's. It prints 786 for L's width and no depths for S and L: 768, 24 and 12 are ours.
DIFFUSSM_SIZES: Mapping[str, Mapping[str, int]] = MappingProxyType(
    {
        "S": {"width": 384, "depth": 12},
        "L": {"width": 768, "depth": 24},
        "XL": {"width": 1152, "depth": 29},
    }
)

# The values that a key may have, where they are names.
CHOICES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "model.name": ("diffussm",),
        "model.scan": ("raster", "2d"),
        "model.discretization": ("zoh", "bilinear"),
        "model.initialization": ("legs", "lin", "inv"),
        "model.ssm_method": ("auto", "recurrent", "associative", "fft", "chunked", "pallas"),
        "model.remat": ("none", "dots", "block"),
        "model.dtype": ("float32", "bfloat16"),
        "data.source": ("digits", "images", "latents"),
        "diffusion.schedule": ("linear", "cosine"),
        "optimizer.decay": ("constant", "cosine"),
        "sampling.sampler": ("ddpm", "ddim"),
        "sampling.guided_channels": ("all", "first_three"),
    }
)

# Whole numbers that must be at least this.
_AT_LEAST: Mapping[str, int] = MappingProxyType(
    {
        "batch_size": 1,
        "num_steps": 1,
        "log_every": 1,
        "eval_every": 0,
        "sample_every": 0,
        "checkpoint_every": 1,
        "keep_every": 0,
        "posthoc_ema_every": 0,
        "model.width": 1,
        "model.depth": 1,
        "model.hourglass_ratio": 1,
        "model.state_size": 2,
        "model.scan_unroll": 1,
        "data.image_size": 1,
        "data.num_channels": 1,
        "data.num_classes": 0,
        "data.downsampling": 1,
        "data.num_threads": 1,
        "optimizer.warmup_steps": 0,
        "optimizer.accumulation_steps": 1,
        "optimizer.max_skipped_steps": 0,
        "sampling.num_steps": 1,
        "sampling.num_grid_rows": 1,
    }
)

# Numbers that must lie in [low, high].
_RANGES: Mapping[str, tuple[float, float]] = MappingProxyType(
    {
        "model.label_dropout": (0, 1),
        "optimizer.learning_rate": (0, float("inf")),
        "optimizer.weight_decay": (0, float("inf")),
        "optimizer.max_grad_norm": (0, float("inf")),
        "optimizer.ema_decay": (0, 1),
        "data.scaling_factor": (1e-6, 1e6),
        "sampling.guidance_scale": (0, float("inf")),
        "sampling.eta": (0, 1),
        "diffusion.num_steps": (21, 100_000),
    }
)


def load_config(file: str) -> ConfigDict:
    """The config of a file of configs/, as --config gives it to the programs: "configs/imagenet256.py:XL".

    Raises:
      FileNotFoundError: there is no such file.
    """
    path, colon, argument = file.partition(":")
    spec = importlib.util.spec_from_file_location("config_file", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(argument) if colon else module.get_config()


def default_config() -> ConfigDict:
    """Every key that a run knows, with a comment where the name does not say it all."""
    config = ConfigDict()
    config.seed = 0
    config.batch_size = 256  # global, over all devices
    config.num_steps = 400_000
    config.log_every = 100
    config.eval_every = 5_000  # 0: never; the loss of the EMA weights on held-out data
    config.sample_every = 5_000  # 0: never; a grid of samples
    config.checkpoint_every = 5_000  # the newest two are kept, and the one of the lowest eval_loss
    config.keep_every = 0  # checkpoints of multiples of it are kept for good; 0: none
    config.posthoc_ema_every = 0  # averages are stored for post-hoc EMA, and kept for good; 0: never

    config.model = ConfigDict()
    config.model.name = "diffussm"
    config.model.width = 384
    config.model.depth = 12
    config.model.hourglass_ratio = 2
    config.model.has_position_embedding = True
    config.model.state_size = 64
    config.model.scan = "raster"  # the paper's; "2d": the SSMs run over the columns too
    config.model.bidirectional = True
    config.model.discretization = "zoh"
    config.model.initialization = "lin"
    config.model.ssm_method = "auto"
    config.model.label_dropout = 0.1
    config.model.remat = "none"  # what is computed again in the backward pass: "dots": all but linear layers; "block"
    config.model.scan_unroll = 1
    config.model.dtype = "float32"  # of the linear layers; SSMs' states, norms and losses are float32 always

    config.data = ConfigDict()
    config.data.source = "digits"
    config.data.path = ""  # "images": what data.sources.open_source reads; "latents": a folder that precompute wrote
    config.data.split = "train"
    config.data.eval_split = "eval"  # held out; "": none
    config.data.image_size = 8  # pixels
    config.data.num_channels = 1  # of what the model sees: pixels or latents
    config.data.num_classes = 10  # 0: unconditional
    config.data.random_crop = False  # of pixels: scaled and placed at random, as ADM's; else at the centre
    config.data.random_flip = False  # mirrors half of the images (latents: always)
    config.data.num_threads = 4  # that read ahead, a batch each
    # Of the autoencoder of latents; a data set's card must agree.
    config.data.downsampling = 1  # pixels a latent position
    config.data.scaling_factor = 1.0
    config.data.vae = ""  # to decode samples: a diffusers folder or repository; must be the one of the card

    config.diffusion = ConfigDict()
    config.diffusion.schedule = "linear"
    config.diffusion.num_steps = 1000
    config.diffusion.clip_x_0 = False  # in sampling; True for pixels, False for latents

    config.optimizer = ConfigDict()
    config.optimizer.learning_rate = 1e-4
    config.optimizer.warmup_steps = 0
    config.optimizer.decay = "constant"  # or "cosine", to zero at num_steps
    config.optimizer.weight_decay = 0.0
    config.optimizer.max_grad_norm = 0.0  # 0: no clipping
    config.optimizer.ema_decay = 0.9999
    config.optimizer.accumulation_steps = 1  # parts of a batch that are computed one after the other, to save memory
    config.optimizer.max_skipped_steps = 10  # in a row, for a loss or gradient that is not finite; more end the run
    config.optimizer.has_ema_warmup = False  # decay of at most (1 + step) / (10 + step)

    config.sampling = ConfigDict()
    config.sampling.sampler = "ddpm"
    config.sampling.num_steps = 250
    config.sampling.eta = 0.0  # of DDIM
    config.sampling.guidance_scale = 1.0  # 1: none
    config.sampling.guided_channels = "all"
    config.sampling.guidance_interval = (0.0, float("inf"))  # in t
    config.sampling.num_grid_rows = 8  # of the grid that training draws

    config.mesh = ConfigDict()
    # Devices along each axis; -1: as many as the others leave.
    config.mesh.data = -1  # copies of the model, each with its part of the batch
    config.mesh.fsdp = 1  # the batch, and parameters and optimizer state too
    config.mesh.tensor = 1  # the width
    return config


def apply_size(config: ConfigDict, size: str) -> None:
    """Sets the model's width and depth to those of a named size; ValueError for another name."""
    if size not in DIFFUSSM_SIZES:
        raise ValueError(f"unknown model size {size!r}; choose one of {', '.join(DIFFUSSM_SIZES)}")
    config.model.update(DIFFUSSM_SIZES[size])


def use_latents(config: ConfigDict, *, vae: str = "stabilityai/sd-vae-ft-ema") -> None:
    """Sets the data to latents of the f8, 4-channel autoencoder of latent diffusion, nothing held out."""
    config.data.source = "latents"
    config.data.num_channels = 4
    config.data.downsampling = 8
    config.data.scaling_factor = 0.18215
    config.data.vae = vae
    config.data.eval_split = ""
    config.eval_every = 0


def paper_config(size: str, *, image_size: int, num_classes: int) -> ConfigDict:
    """The paper's training setting on latents (arXiv 2311.18257, section 4.1; what it leaves open as DiT and ADM have
    it).

    Args:
      size: "S", "L" or "XL".
      image_size: pixels.
      num_classes: 0 for unconditional.

    Raises:
      ValueError: the size is unknown.
    """
    config = default_config()
    apply_size(config, size)
    config.model.remat = "block"
    config.model.dtype = "bfloat16"
    use_latents(config)
    config.data.image_size = image_size
    config.data.num_classes = num_classes
    return config


def flatten(values: Mapping | ConfigDict, prefix: str = "") -> dict[str, object]:
    """The values of all groups under dotted keys, "model.depth"."""
    items = {}
    for key, value in values.items():
        is_group = isinstance(value, Mapping | ConfigDict)
        items.update(flatten(value, f"{prefix}{key}.") if is_group else {prefix + key: value})
    return items


def validate(config: ConfigDict, num_devices: int = 1) -> None:
    """Checks a whole config, in milliseconds, before anything is built.

    Args:
      config: in the form of `default_config()`.
      num_devices: how many devices there are.

    Raises:
      ValueError: a key is missing or unknown, or a value is not allowed or does not fit another or the devices. The
        message names the key, the value and what is allowed.
    """
    values, known = flatten(config), flatten(default_config())
    unknown, missing = sorted(values.keys() - known.keys()), sorted(known.keys() - values.keys())
    if unknown or missing:
        raise ValueError(f"config keys do not match: unknown {unknown}, missing {missing}; known are {sorted(known)}")
    for key, choices in CHOICES.items():
        if values[key] not in choices:
            raise ValueError(f"config.{key} is {values[key]!r}; choose one of {', '.join(choices)}")
    for key, minimum in _AT_LEAST.items():
        if not isinstance(values[key], int) or values[key] < minimum:
            raise ValueError(f"config.{key} must be a whole number of at least {minimum}, got {values[key]!r}")
    for key, (low, high) in _RANGES.items():
        if not low <= values[key] <= high:
            raise ValueError(f"config.{key} must be from {low} to {high}, got {values[key]!r}")
    _check_combinations(config, num_devices)


def _check_combinations(config: ConfigDict, num_devices: int) -> None:
    model, data = config.model, config.data
    if config.eval_every and not data.eval_split:
        raise ValueError("config.eval_every needs held-out data: set config.data.eval_split, or eval_every to 0")
    if data.image_size % data.downsampling:
        raise ValueError(
            f"config.data.image_size = {data.image_size} is not a multiple of "
            f"config.data.downsampling = {data.downsampling}"
        )
    latent_width = data.image_size // data.downsampling
    M = model.hourglass_ratio
    if latent_width % M or 2 * model.width % M:
        raise ValueError(
            f"config.model.hourglass_ratio M = {M} must divide the latent's width {latent_width} "
            f"(so that L = {latent_width**2} is a multiple of M) and 2 * config.model.width = {2 * model.width}"
        )
    if model.has_position_embedding and model.width % 4:
        raise ValueError(f"config.model.width must be a multiple of 4 for the position embedding, got {model.width}")
    if model.state_size % 2:
        raise ValueError(f"config.model.state_size must be even, got {model.state_size}")
    if config.sampling.num_steps > config.diffusion.num_steps:
        raise ValueError(
            f"config.sampling.num_steps = {config.sampling.num_steps} exceeds "
            f"config.diffusion.num_steps = {config.diffusion.num_steps}"
        )
    if config.sampling.guidance_scale != 1 and (data.num_classes == 0 or model.label_dropout == 0):
        raise ValueError(
            f"config.sampling.guidance_scale = {config.sampling.guidance_scale} needs a null label: classes and "
            f"label dropout, got config.data.num_classes = {data.num_classes} and "
            f"config.model.label_dropout = {model.label_dropout}"
        )
    if data.source != "latents" and (data.downsampling, data.scaling_factor) != (1, 1):
        raise ValueError(
            f"config.data.downsampling and scaling_factor must be 1 for pixels, got {data.downsampling} and "
            f"{data.scaling_factor}"
        )
    if data.random_crop and data.source != "images":
        raise ValueError(f"config.data.random_crop is for the source images, not {data.source}")
    try:
        data, fsdp, tensor = mesh_shape(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, num_devices=num_devices)
    except ValueError as error:
        raise ValueError(f"config.mesh: {error}") from error
    parts = data * fsdp * config.optimizer.accumulation_steps
    if config.batch_size % parts:
        raise ValueError(
            f"config.batch_size = {config.batch_size} is not a multiple of {parts}: config.mesh.data = {data} x fsdp = "
            f"{fsdp} devices x config.optimizer.accumulation_steps = {config.optimizer.accumulation_steps}"
        )
    if model.width % (fsdp * tensor):
        raise ValueError(
            f"config.model.width = {model.width} is not a multiple of config.mesh.fsdp = {fsdp} x tensor = {tensor}"
        )


def images_at_a_time(config: ConfigDict, mesh: Mapping[str, int]) -> int:
    """How many images of a batch a device computes together, on a mesh of so many devices along each axis."""
    return config.batch_size // (mesh["data"] * mesh["fsdp"] * config.optimizer.accumulation_steps)


def mesh_shape(data: int, fsdp: int, tensor: int, *, num_devices: int) -> tuple[int, int, int]:
    """The sizes of the mesh's axes, with a -1 filled so that all devices are used.

    Their product may be smaller than the number of devices: then only the first are used.

    Raises:
      ValueError: a size is neither -1 nor positive, or the sizes do not fit the devices.
    """
    sizes = (data, fsdp, tensor)
    named = f"data = {data}, fsdp = {fsdp}, tensor = {tensor}"
    if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
        raise ValueError(f"the axes must be positive, and one of them may be -1 to fill; got {named}")
    product = math.prod(size for size in sizes if size != -1)
    if product > num_devices:
        raise ValueError(f"{named} needs {product} devices, there are {num_devices}")
    if -1 in sizes and num_devices % product:
        raise ValueError(f"{named} does not divide the {num_devices} devices")
    return tuple(num_devices // product if size == -1 else size for size in sizes)
