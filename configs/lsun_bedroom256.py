"""DiffuSSM on LSUN bedroom latents at 256 x 256 pixels, unconditional: the paper's setting (arXiv 2311.18257).

    python -m diffussm_jax.main --config=configs/lsun_bedroom256.py:XL --workdir=runs/lsun_bedroom256

Sizes: `:S`, `:L` and `:XL` (default).
An XL step at batch size 256 takes 227 T multiply-adds in the linear layers, forward and backward: 1.1 s on one H100 at
40 % MFU (computed, not measured, without the SSMs). The paper's scores on LSUN are not quoted here.
"""

from diffussm_jax.config import paper_config


def get_config(size="XL"):
    return paper_config(size or "XL", image_size=256, num_classes=0)
