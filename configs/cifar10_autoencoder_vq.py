"""A VQ autoencoder for CIFAR-10, 32 x 32 x 3 to 16 x 16 codes of a codebook of 512 (f2), with a patch discriminator.

    python -m diffussm_jax.main --config=configs/cifar10_autoencoder_vq.py --workdir=runs/cifar10_vq \\
      --config.data.path=cifar10.zip

It differs from configs/cifar10_autoencoder_kl.py in the regularizer alone. The codebook follows a moving average of its
latents, and codes that are hardly used start again at latents of the batch.
"""

from pathlib import Path

from diffussm_jax.config import choose, load_config


def get_config():
    config = load_config(str(Path(__file__).with_name("cifar10_autoencoder_kl.py")))
    choose(config, "task.autoencoder.name", "vq")
    autoencoder = config.task.autoencoder
    autoencoder.num_vq_embeddings = 512
    autoencoder.codebook_decay = 0.99
    autoencoder.min_usage = 0.5  # of the 16 latents of a batch that a code would have if all had as many
    return config
