"""LDM-4's U-Net on ImageNet latents at 256 x 256 pixels, class-conditional (arXiv 2112.10752): cin256-v2.

    python -m diffussm_jax.main --config=configs/ldm_cin256.py --workdir=runs/ldm_cin256 \
        --config.data.path=LATENTS --config.data.vae=VAE

LATENTS are 64 x 64 x 3, from an autoencoder with downsampling 4 and 3 channels; LDM's is VQ-f4. A label is a token for
cross-attention. The square roots of the betas are linear.
400,920,579 parameters, as latent diffusion's, and 1001 x 512 of the labels; 104 G multiply-adds. The paper's run takes
about 95 H100-hours at 40 % MFU (computed, not measured). Its FID: 10.56 without guidance, 3.60 with.
"""

from diffussm_jax.config import choose, paper_config


def get_config():
    config = paper_config("LDM-4", image_size=256, num_classes=1000, model="unet")
    config.batch_size = 1200
    config.num_steps = 178_000
    config.conditioners.label.token_width = 512
    config.data.update(downsampling=4, num_channels=3, scaling_factor=1.0, vae="")
    choose(config, "diffusion.schedule", "scaled_linear")
    config.diffusion.has_learned_variance = False
    return config
