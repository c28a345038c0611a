"""DiffuSSM on ImageNet latents at 512 x 512 pixels: the paper's setting (arXiv 2311.18257).

    python -m diffussm_jax.main --config=configs/imagenet512.py:XL --workdir=runs/imagenet512

Sizes: `:S`, `:L` and `:XL` (default).
The linear layers of an XL run over the paper's 302 M images take about 1500 H100-hours at 40 % MFU (computed, not
measured, without the SSMs). The paper's FID for XL with guidance: 3.41.
"""

from diffussm_jax.config import paper_config


def get_config(size="XL"):
    return paper_config(size or "XL", image_size=512, num_classes=1000)
