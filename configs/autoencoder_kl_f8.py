"""LDM's kl-f8, a KL autoencoder: 256 x 256 x 3 to 32 x 32 x 4.

    python -m diffussm_jax.main --config=configs/autoencoder_kl_f8.py:imagenet --workdir=runs/kl_f8 \\
        --config.data.path=imagenet

`:imagenet` (default) or `:openimages`. configs/autoencoder.py says which files are read, where the values come from,
and what differs from LDM. 83,653,863 parameters; about 24 H100-hours on ImageNet (computed, not measured). LDM's own
scores, after training on Open Images: rFID 0.90, PSNR 24.19.
"""

from pathlib import Path

from diffussm_jax.config import load_config


def get_config(data="imagenet"):
    return load_config(f"{Path(__file__).with_name('autoencoder.py')}:kl-f8:{data}")
