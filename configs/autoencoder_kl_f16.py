"""LDM's kl-f16, a KL autoencoder: 256 x 256 x 3 to 16 x 16 x 16.

    python -m diffussm_jax.main --config=configs/autoencoder_kl_f16.py:imagenet --workdir=runs/kl_f16 \\
        --config.data.path=imagenet

`:imagenet` (default) or `:openimages`. configs/autoencoder.py says which files are read, where the values come from,
and what differs from LDM. 69,610,963 parameters; about 20 H100-hours on ImageNet (computed, not measured). LDM's own
scores, after training on Open Images: rFID 0.87, PSNR 24.08.
"""

from pathlib import Path

from diffussm_jax.config import load_config


def get_config(data="imagenet"):
    return load_config(f"{Path(__file__).with_name('autoencoder.py')}:kl-f16:{data}")
