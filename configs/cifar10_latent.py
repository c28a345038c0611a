"""DiffuSSM on latents of CIFAR-10, class-conditional: the latent counterpart of `cifar10.py`.

    python -m diffussm_jax.precompute --source=cifar10.zip --source_split=train --image_size=32 --vae=VAE \
        --out=latents/cifar10
    python -m diffussm_jax.main --config=configs/cifar10_latent.py --workdir=runs/cifar10_latent \
        --config.data.path=latents/cifar10 --config.data.vae=VAE

VAE is an autoencoder, such as the work directory of a run of `cifar10_autoencoder_kl.py`. Its downsampling, number of
channels and scaling factor are those of the data set, which records them. The model is small enough for a CPU, to try
the whole latent pipeline.
"""

from diffussm_jax.config import default_config, use_latents
from diffussm_jax.config_keys import FROM_DATA


def get_config():
    config = default_config()
    config.batch_size = 128
    config.num_steps = 50_000

    config.model.width = 128
    config.model.depth = 6

    use_latents(config, vae="")
    config.data.image_size = 32
    config.data.update(downsampling=FROM_DATA, num_channels=FROM_DATA, scaling_factor=float(FROM_DATA))
    config.data.num_classes = 10

    config.optimizer.learning_rate = 3e-4
    config.optimizer.warmup_steps = 500
    config.optimizer.max_grad_norm = 1.0
    return config
