"""The keys of a config, with their defaults and what they may be. `config` says how configs are read and changed."""

import dataclasses
import math
from typing import Annotated

from diffussm_jax.diffusion import TIME_GRIDS
from diffussm_jax.evaluation.extractor import DISTANCES
from diffussm_jax.options import CHANGEABLE_ON_RESUME, Choices, Range
from diffussm_jax.training.checkpoint import EVAL_LOSS
from diffussm_jax.training.optimizer import DECAYS

# Channels that classifier-free guidance acts on, by the values of config.sampling.guided_channels.
GUIDED_CHANNELS = {"all": None, "first_three": 3}
FROM_DATA = -1  # in place of a number of config.data: found in the data when training starts (`data_config`)
AUTO_SPLIT = "auto"  # likewise in place of a split
AUTO_METRIC = "auto"
MAX_SEED = 2**32 - 1  # JAX's keys are made of 32 bits unless it computes with 64


@dataclasses.dataclass
class General:
    """Keys of the config itself."""

    seed: Annotated[int, Range(0, MAX_SEED)] = 0
    init_from: str = ""  # initial weights (`finetune`): the WORKDIR[:STEP] of another run, or an export; "": fresh
    batch_size: Annotated[int, Range(1)] = 256  # global, over all devices
    num_steps: Annotated[int, Range(1)] = 400_000
    log_every: Annotated[int, Range(1), CHANGEABLE_ON_RESUME] = 100
    eval_every: Annotated[int, Range(0), CHANGEABLE_ON_RESUME] = 5_000  # the EMA weights' held-out loss; 0: never
    eval_scores_every: Annotated[int, Range(0), CHANGEABLE_ON_RESUME] = 0  # scores of samples; 0: never
    sample_every: Annotated[int, Range(0), CHANGEABLE_ON_RESUME] = 5_000  # a grid of samples; 0: never
    checkpoint_every: Annotated[int, Range(1), CHANGEABLE_ON_RESUME] = 5_000  # the newest two and the best are kept
    keep_every: Annotated[int, Range(0), CHANGEABLE_ON_RESUME] = 0  # checkpoints of its multiples are kept; 0: none
    posthoc_ema_every: Annotated[int, Range(0)] = 0  # averages are stored for post-hoc EMA; 0: never
    # By which the best checkpoint is kept; "auto": the Frechet distance if there are scores, else the held-out loss.
    best_metric: Annotated[str, CHANGEABLE_ON_RESUME] = AUTO_METRIC
    best_mode: Annotated[str, Choices(("min", "max")), CHANGEABLE_ON_RESUME] = EVAL_LOSS.mode
    imports: Annotated[tuple, CHANGEABLE_ON_RESUME] = ()  # modules that register more components


@dataclasses.dataclass
class Data:
    """Keys of `config.data`."""

    source: str = "digits"
    path: Annotated[str, CHANGEABLE_ON_RESUME] = ""  # of "images" (see data.sources.open_source) and "latents"
    split: str = "train"
    eval_split: Annotated[str, CHANGEABLE_ON_RESUME] = "eval"  # held out; "": none
    holdout: Annotated[float, Range(0, 0.5)] = 0.0  # fraction of `split` that is held out, by a hash of the keys
    image_size: Annotated[int, Range(1)] = 8  # pixels
    num_channels: Annotated[int, Range(1)] = 1  # of what the model sees: pixels or latents
    num_classes: Annotated[int, Range(0, 2**31 - 2)] = 10  # 0: unconditional
    random_crop: bool = False  # crops of pixels are placed and scaled at random, as ADM's; else at the centre
    min_crop_fraction: Annotated[float, Range(0.01, 1.0)] = 0.8  # of the shorter side, that they keep; 1: LDM's crops
    random_flip: bool = False  # mirrors half of the images (latents: always)
    num_threads: Annotated[int, Range(1), CHANGEABLE_ON_RESUME] = 4  # that read ahead, a batch each
    verify: Annotated[bool, CHANGEABLE_ON_RESUME] = False  # compares latents with their checksums at the start
    # Of the autoencoder of latents; a data set's card must agree, and -1 takes them from it.
    downsampling: Annotated[int, Range(1)] = 1  # pixels per latent position
    scaling_factor: Annotated[float, Range(1e-6, 1e6)] = 1.0
    vae: Annotated[str, CHANGEABLE_ON_RESUME] = ""  # a diffusers folder or repository, to decode samples


@dataclasses.dataclass
class Diffusion:
    """Keys of `config.diffusion`."""

    schedule: str = "linear"  # the forward process
    target: str = "noise"  # what the model predicts
    weighting: str = "none"  # of the loss
    has_learned_variance: bool = True  # the model returns 2C channels
    clip_x_0: bool = False  # in sampling; True for pixels, False for latents


@dataclasses.dataclass
class Optimizer:
    """Keys of `config.optimizer`."""

    learning_rate: Annotated[float, Range(0)] = 1e-4
    warmup_steps: Annotated[int, Range(0)] = 0
    decay: Annotated[str, Choices(DECAYS)] = "constant"  # "cosine": to zero at num_steps
    weight_decay: Annotated[float, Range(0)] = 0.0
    max_grad_norm: Annotated[float, Range(0)] = 0.0  # 0: no clipping
    ema_decay: Annotated[float, Range(0, 1)] = 0.9999
    has_ema_warmup: bool = False  # decay of at most (1 + step) / (10 + step)
    accumulation_steps: Annotated[int, Range(1), CHANGEABLE_ON_RESUME] = 1  # microbatches, to save memory
    max_skipped_steps: Annotated[int, Range(0), CHANGEABLE_ON_RESUME] = 10  # in a row, for a loss that is not finite


@dataclasses.dataclass
class Sampling:
    """Keys of `config.sampling`."""

    sampler: str = "ddpm"
    num_steps: Annotated[int, Range(1, 100_000)] = 250
    time_grid: Annotated[str, Choices(TIME_GRIDS)] = "uniform"
    guidance_scale: Annotated[float, Range(0)] = 1.0  # 1: none
    guidance_rescale: Annotated[float, Range(0, 1)] = 0.0  # share of x_0 with the contrast it had before; 0: none
    dynamic_threshold: Annotated[float, Range(0, 1)] = 0.0  # a percentile such as 0.995, instead of clip_x_0; 0: none
    guided_channels: Annotated[str, Choices(GUIDED_CHANNELS)] = "all"
    guidance_interval: tuple = (0.0, math.inf)  # in t
    num_grid_rows: Annotated[int, Range(1)] = 8  # of the grid that training draws


@dataclasses.dataclass
class Scores:
    """Keys of `config.scores`, for `config.eval_scores_every`."""

    features: Annotated[str, Choices(DISTANCES)] = "digits"  # the network
    weights: str = ""  # of a pretrained one; "": those that `evaluate --convert` read
    reference: str = ""  # statistics of real images (`evaluate --make_reference`); "": of those that are trained on
    num_samples: Annotated[int, Range(10)] = 1000


@dataclasses.dataclass
class Mesh:
    """Keys of `config.mesh`: devices along each axis; -1: as many as the others leave."""

    data: int = -1  # copies of the model, each with its part of the batch
    fsdp: int = 1  # the batch, and parameters and optimizer state too
    tensor: int = 1  # the width


GROUPS = {
    "data": Data,
    "diffusion": Diffusion,
    "optimizer": Optimizer,
    "sampling": Sampling,
    "scores": Scores,
    "mesh": Mesh,
}
