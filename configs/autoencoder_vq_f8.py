"""LDM's vq-f8: a VQ autoencoder from 256 x 256 x 3 to 32 x 32 x 4 of a codebook of 16,384.

    python -m diffussm_jax.main --config=configs/autoencoder_vq_f8.py:imagenet --workdir=runs/vq_f8 \\
        --config.data.path=imagenet

`:imagenet` (default) or `:openimages`. configs/autoencoder.py says what is read, where the values come from, and what
differs from LDM. 67,717,295 parameters; about 31 H100-hours on ImageNet (computed, not measured). LDM's rFID on Open Images:
1.14; PSNR: 23.07.
"""

from pathlib import Path

from diffussm_jax.config import load_config


def get_config(data="imagenet"):
    return load_config(f"{Path(__file__).with_name('autoencoder.py')}:vq-f8:{data}")
