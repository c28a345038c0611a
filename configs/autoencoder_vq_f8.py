"""LDM's vq-f8, a VQ autoencoder: 256 x 256 x 3 to 32 x 32 codes of 4 channels, 16,384 in all.

    python -m diffussm_jax.main --config=configs/autoencoder_vq_f8.py:imagenet --workdir=runs/vq_f8 \\
        --config.data.path=imagenet

`:imagenet` (default) or `:openimages`. configs/autoencoder.py says which files are read, where the values come from,
and what differs from LDM. 67,717,295 parameters; about 31 H100-hours on ImageNet (computed, not measured). LDM's own
scores, after training on Open Images: rFID 1.14, PSNR 23.07.
"""

from pathlib import Path

from diffussm_jax.config import load_config


def get_config(data="imagenet"):
    return load_config(f"{Path(__file__).with_name('autoencoder.py')}:vq-f8:{data}")
