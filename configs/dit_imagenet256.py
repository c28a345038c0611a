"""DiT on ImageNet latents at 256 x 256 pixels: the setting of its paper (arXiv 2212.09748).

    python -m diffussm_jax.main --config=configs/dit_imagenet256.py:XL/2 --workdir=runs/dit_imagenet256

Sizes: `:S/2`, `:B/2`, `:L/2` and `:XL/2` (default), and each with patches of 1, 4 or 8.
An XL/2 run over the paper's 1792 M images (7 M steps) takes about 900 H100-hours at 40 % MFU (computed, not measured).
The paper's FID for XL/2: 9.62 without guidance, 2.27 with.
"""

from diffussm_jax.config import paper_config


def get_config(size="XL/2"):
    return paper_config(size or "XL/2", image_size=256, num_classes=1000, model="dit")
