"""DiffuSSM on ImageNet latents at 256 x 256 pixels: the paper's setting (arXiv 2311.18257).

    python -m diffussm_jax.main --config=configs/imagenet256.py:XL --workdir=runs/imagenet256

Sizes: `:S`, `:L` and `:XL` (default).
The linear layers of an XL run over the paper's 660 M images take about 800 H100-hours at 40 % MFU (computed, not
measured, without the SSMs). The paper's FID for XL: 9.07 without guidance, 2.28 with.
"""

from diffussm_jax.config import paper_config


def get_config(size="XL"):
    return paper_config(size or "XL", image_size=256, num_classes=1000)
