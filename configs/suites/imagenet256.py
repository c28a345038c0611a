"""The models of the papers' tables on ImageNet at 256 x 256 pixels, as a plan: memory and hours, and nothing trained.

    python -m diffussm_jax.compare configs/suites/imagenet256.py --workdir=runs/imagenet256 --topology=v5e:16x16

Compiling the five takes some minutes. Images trained on: DiffuSSM-XL 660 M (arXiv 2311.18257), DiT-XL/2 1792 M
(7 M steps of 256, arXiv 2212.09748), ADM 507 M (1.98 M steps of 256, arXiv 2105.05233), LDM-4 214 M (178,000 steps of
1200, arXiv 2112.10752; here of 1024, which the devices divide). The last two are from memory, not checked against the
papers. DiT-XL/1 has no published run: it has the positions of DiffuSSM-XL, and the images of DiT-XL/2.
"""

from diffussm_jax.compare import Budget, Suite
from diffussm_jax.config import apply_size, choose, default_config, paper_config, use_latents

NOTES = (
    "Memory and hours say nothing of quality. The papers' FID at 256 pixels without guidance: 9.07 for DiffuSSM-XL "
    "after 660 M images, 9.62 for DiT-XL/2 after 1792 M. ADM works on pixels, the others on latents, whose autoencoder "
    "is not counted."
)


def latents(model, size, num_images):
    config = paper_config(size, image_size=256, num_classes=1000, model=model)
    config.num_steps = round(num_images / config.batch_size)
    return config


def adm():
    config = default_config()
    choose(config, "model.name", "unet")
    apply_size(config, "ADM-256")
    config.model.update(remat="block", dtype="bfloat16")
    config.data.update(source="images", image_size=256, num_channels=3, num_classes=1000)
    config.num_steps = 1_980_000
    return config


def ldm():
    config = paper_config("LDM-4", image_size=256, num_classes=1000, model="unet")
    use_latents(config)
    config.data.update(num_channels=3, downsampling=4)
    config.conditioners.label.token_width = 512
    config.diffusion.has_learned_variance = False
    config.batch_size = 1024
    config.num_steps = 178_000 * 1200 // 1024
    return config


def get_suite():
    return Suite(
        title="The papers' table at 256 pixels, as a plan",
        notes=NOTES,
        configs={
            "DiffuSSM-XL": latents("diffussm", "XL", 660e6),
            "DiT-XL/2": latents("dit", "XL/2", 1792e6),
            "DiT-XL/1": latents("dit", "XL/1", 1792e6),
            "ADM": adm(),
            "LDM-4": ldm(),
        },
        budget=Budget("images", 660e6),
        stages=("plan",),
    )
