"""LDM's kl-f4, a KL autoencoder: 256 x 256 x 3 to 64 x 64 x 3.

    python -m diffussm_jax.main --config=configs/autoencoder_kl_f4.py:imagenet --workdir=runs/kl_f4 \\
        --config.data.path=imagenet

`:imagenet` (default) or `:openimages`. configs/autoencoder.py says which files are read, where the values come from,
and what differs from LDM. 55,312,063 parameters; about 19 H100-hours on ImageNet (computed, not measured). LDM's own
scores, after training on Open Images: rFID 0.27, PSNR 27.53.
"""

from pathlib import Path

from diffussm_jax.config import load_config


def get_config(data="imagenet"):
    return load_config(f"{Path(__file__).with_name('autoencoder.py')}:kl-f4:{data}")
