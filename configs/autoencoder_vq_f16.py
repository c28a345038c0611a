"""LDM's vq-f16, a VQ autoencoder: 256 x 256 x 3 to 16 x 16 codes of 8 channels, 16,384 in all.

    python -m diffussm_jax.main --config=configs/autoencoder_vq_f16.py:imagenet --workdir=runs/vq_f16 \\
        --config.data.path=imagenet

`:imagenet` (default) or `:openimages`. configs/autoencoder.py says which files are read, where the values come from,
and what differs from LDM. 69,593,371 parameters; about 29 H100-hours on ImageNet (computed, not measured). LDM's own
scores, after training on Open Images: rFID 5.15, PSNR 20.83.
"""

from pathlib import Path

from diffussm_jax.config import load_config


def get_config(data="imagenet"):
    return load_config(f"{Path(__file__).with_name('autoencoder.py')}:vq-f16:{data}")
