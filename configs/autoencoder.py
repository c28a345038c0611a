"""LDM's first stages, trained at 256 x 256 pixels (arXiv 2112.10752, section 3.1 and appendix G).

    python -m diffussm_jax.main --config=configs/autoencoder.py:kl-f8:imagenet --workdir=runs/kl_f8 \\
        --config.data.path=imagenet

    kind      latents        codes    parameters   batch     steps   H100-hours   rFID    PSNR
    `kl-f4`   64 x 64 x 3             55,312,063      24   176,991           19   0.27   27.53
    `kl-f8`   32 x 32 x 4             83,653,863      24   246,803           24   0.90   24.19
    `kl-f16`  16 x 16 x 16            69,610,963      24   442,998           20   0.87   24.08
    `vq-f4`   64 x 64 x 3     8,192   55,322,782       8   533,066           19   0.58   27.43
    `vq-f8`   32 x 32 x 4    16,384   67,717,295      10   971,043           31   1.14   23.07
    `vq-f16`  16 x 16 x 8    16,384   69,593,371      14 1,101,166           29   5.15   20.83

`kl-f8` is the default. The data is `:imagenet` (default), a folder as for configs/adm_imagenet.py, or `:openimages`, a
folder with train/ and validation/. configs/autoencoder_kl_f8.py and its like choose the kind by their names. LPIPS is
read from vgg16-397923af.pth of torchvision and vgg.pth of LPIPS 0.1, in the working directory or where
config.task.vgg_weights and lpips_weights say. For rFID in the report at the end, set
config.task.report_features=inception (docs/evaluation.md).

Batches and hours are those on ImageNet. Hours are computed, not measured: the convolutions and attention of the
autoencoder, the discriminator and LPIPS, at 40 % of the peak of TF32. Small batches are slower. LDM trained in float32;
config.task.autoencoder.dtype=bfloat16 takes about half the time.

Steps, rFID and PSNR are those that the README of CompVis/latent-diffusion prints of models trained on Open Images. The
settings are those of its configs/autoencoder on ImageNet (KL, 12 images twice on one GPU) and of its
models/first_stage_models (VQ, and all on Open Images: KL with 10, 4 and 6 images on each GPU; how many GPUs is not
published). The learning rate is 4.5e-6 times the batch size, as there: change both. There is no average of the weights,
as there; config.optimizer.ema_decay keeps one.

Other than in LDM, both networks see the same reconstruction in a step, BatchNorm's statistics are those of all devices,
held-out images are cropped at the centre, and all of ImageNet is used. Crops keep 1/2 to 1 of the shorter side, uniform
in the size to which the image is scaled, not in the part that is kept. On Open Images they keep 2/3 to 1; LDM's keep
2/3, and those of `vq-f4` are 256 pixels of the image as it is.
"""

from typing import NamedTuple

from diffussm_jax.config import choose, default_config


class _Kind(NamedTuple):
    """`widths` of the levels are multiples of 128. `batch_size` is that of one GPU on Open Images."""

    widths: tuple[int, ...]
    latent_channels: int
    batch_size: int
    num_steps: int
    attention_levels: tuple[int, ...] = ()
    num_codes: int = 0
    disc_start: int = 50_001
    disc_weight: float = 0.5
    disc_layers: int = 3


_KINDS = {
    "kl-f4": _Kind((1, 2, 4), 3, 10, 176_991),
    "kl-f8": _Kind((1, 2, 4, 4), 4, 4, 246_803),
    "kl-f16": _Kind((1, 1, 2, 2, 4), 16, 6, 442_998, (4,)),
    "vq-f4": _Kind((1, 2, 4), 3, 8, 533_066, (), 8192, 0, 0.75),
    "vq-f8": _Kind((1, 2, 2, 4), 4, 10, 971_043, (3,), 16384, 1, 0.6, 2),
    "vq-f16": _Kind((1, 1, 2, 2, 4), 8, 14, 1_101_166, (4,), 16384, 250_001, 0.75, 2),
}
_DATA = {  # number of classes, the held-out split, and the least part of the shorter side that crops keep
    "imagenet": (1000, "val", 1 / 2),
    "openimages": (0, "validation", 2 / 3),
}
_LEARNING_RATE = 4.5e-6  # for each image of a batch


def get_config(kind_and_data="kl-f8:imagenet"):
    name, _, data = kind_and_data.partition(":")
    name, data = name or "kl-f8", data or "imagenet"
    for what, value, known in (("autoencoder", name, _KINDS), ("data", data, _DATA)):
        if value not in known:
            raise ValueError(f"unknown {what} {value!r}; choose one of {', '.join(known)}")
    kind = _KINDS[name]
    config = default_config()
    choose(config, "task.name", "autoencoder")
    choose(config, "task.autoencoder.name", name[:2])
    config.batch_size, config.num_steps = kind.batch_size, kind.num_steps
    if data == "imagenet" and not kind.num_codes:
        config.batch_size, config.optimizer.accumulation_steps = 24, 2

    config.data.source = "images"
    config.data.image_size = 256
    config.data.num_channels = 3
    config.data.random_crop = True
    config.data.num_classes, config.data.eval_split, config.data.min_crop_fraction = _DATA[data]

    task, autoencoder = config.task, config.task.autoencoder
    autoencoder.block_out_channels = tuple(128 * width for width in kind.widths)
    autoencoder.attention_levels = kind.attention_levels
    autoencoder.latent_channels = kind.latent_channels
    if kind.num_codes:
        autoencoder.num_vq_embeddings = kind.num_codes
    task.perceptual = "lpips"
    task.vgg_weights = "vgg16-397923af.pth"
    task.lpips_weights = "vgg.pth"
    task.disc_start, task.disc_weight, task.disc_layers = kind.disc_start, kind.disc_weight, kind.disc_layers

    config.optimizer.learning_rate = _LEARNING_RATE * config.batch_size
    config.optimizer.ema_decay = 0.0
    return config
