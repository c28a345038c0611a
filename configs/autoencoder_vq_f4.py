"""LDM's vq-f4, a VQ autoencoder: 256 x 256 x 3 to 64 x 64 codes of 3 channels, 8,192 in all.

    python -m diffussm_jax.main --config=configs/autoencoder_vq_f4.py:imagenet --workdir=runs/vq_f4 \\
        --config.data.path=imagenet

`:imagenet` (default) or `:openimages`. configs/autoencoder.py says which files are read, where the values come from,
and what differs from LDM. 55,322,782 parameters; about 19 H100-hours on ImageNet (computed, not measured). LDM's own
scores, after training on Open Images: rFID 0.58, PSNR 27.43.
"""

from pathlib import Path

from diffussm_jax.config import load_config


def get_config(data="imagenet"):
    return load_config(f"{Path(__file__).with_name('autoencoder.py')}:vq-f4:{data}")
