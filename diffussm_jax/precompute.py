"""Precomputes a latent data set from images with a frozen autoencoder, an `AutoencoderKL` or a `VQModel`.

    python -m diffussm_jax.precompute --source=ILSVRC2012_img_train.tar --out=latents/imagenet256 --image_size=256 \\
        --vae=stabilityai/sd-vae-ft-ema

--vae may be the work directory of a run that trained one. Latents of a `VQModel` are stored before quantization, and
quantized when they are decoded, as in latent diffusion (arXiv 2112.10752).

`data.sources.open_source` lists the sources: a folder, a zip or tar of images, LSUN's LMDB, a TFDS data set. Images are
centre-cropped as in ADM, and made gray for an autoencoder of one channel. `data.latents` describes the output format.
To resume after any interruption, repeat the command: it makes the missing shards. --verify checks a finished split.

Each batch is split over the local devices. With several hosts (TPU pods, SLURM, or --distributed) each host makes its
share of the shards.
"""

import math
import signal
import sys

from absl import app, flags
from etils import epath

from diffussm_jax import cli
from diffussm_jax.autoencoder import from_diffusers
from diffussm_jax.data import latents
from diffussm_jax.data.sources import open_source
from diffussm_jax.data.transforms import save_png
from diffussm_jax.io import check_path
from diffussm_jax.precompute_job import Job, check_finished, draw_reconstructions, precompute

_FLAGS = flags.FlagValues()  # of its own, so that several programs can be imported together
_SOURCE = flags.DEFINE_string(
    "source", None, "Folder, zip or tar of images, LSUN LMDB, or tfds:NAME.", flag_values=_FLAGS
)
_SPLIT = flags.DEFINE_string("split", "train", "Name of the split to write.", flag_values=_FLAGS)
_SOURCE_SPLIT = flags.DEFINE_string(
    "source_split", "", "Split of the source: a top-level folder (empty: all), or a TFDS split.", flag_values=_FLAGS
)
_OUT = flags.DEFINE_string("out", None, "Folder of the data set.", flag_values=_FLAGS)
_IMAGE_SIZE = flags.DEFINE_integer(
    "image_size", 256, "Pixels after the crop.", lower_bound=1, upper_bound=8192, flag_values=_FLAGS
)
_VAE = flags.DEFINE_string(
    "vae",
    "stabilityai/sd-vae-ft-ema",
    "A diffusers folder or repository of an AutoencoderKL or a VQModel, or the WORKDIR of a run that trained one.",
    flag_values=_FLAGS,
)
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Encoder dtype.", flag_values=_FLAGS)
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", 32, "Images per batch, over all local devices.", lower_bound=1, upper_bound=65536, flag_values=_FLAGS
)
_SHARD_SIZE = flags.DEFINE_integer("shard_size", 4096, "Images per shard.", lower_bound=1, flag_values=_FLAGS)
_MAX_BAD_FRACTION = flags.DEFINE_float(
    "max_bad_fraction", 0.01, "Fails if more images are broken.", 0.0, 1.0, flag_values=_FLAGS
)
_NUM_THREADS = flags.DEFINE_integer("num_threads", 8, "Image reader threads.", lower_bound=1, flag_values=_FLAGS)
_VERIFY = flags.DEFINE_bool(
    "verify", False, "Verifies a finished split, and draws originals and reconstructions.", flag_values=_FLAGS
)
_DISTRIBUTED = flags.DEFINE_string(
    "distributed",
    "auto",
    "auto, none, or COORDINATOR:PORT,NUM_PROCESSES,PROCESS_ID (`cli.join_hosts`).",
    flag_values=_FLAGS,
)


def main() -> int:
    """Precomputes or verifies. Returns the exit code: 0, or 130 after Ctrl-C."""
    if not _SOURCE.value or not _OUT.value:
        raise app.UsageError("give --source=IMAGES and --out=FOLDER")
    if math.isnan(_MAX_BAD_FRACTION.value):  # within any bounds, to absl
        raise ValueError("--max_bad_fraction must be from 0 to 1, got nan")
    check_path(_OUT.value)
    cli.join_hosts(_DISTRIBUTED.value)
    cli.keep_freed_memory()
    out = epath.Path(_OUT.value)
    if _VERIFY.value:
        card = latents.verify(out, _SPLIT.value)  # before loading the weights
        print(f"{card['num_records']:,} records in {len(card['shards'])} shards are as their card says.", flush=True)
    vae, params = from_diffusers(_VAE.value, dtype=_DTYPE.value)
    job = Job(
        source=open_source(_SOURCE.value, _SOURCE_SPLIT.value),
        out=out,
        split=_SPLIT.value,
        image_size=_IMAGE_SIZE.value,
        vae_name=_VAE.value,
        vae=vae,
        params=params,
        batch_size=_BATCH_SIZE.value,
        shard_size=_SHARD_SIZE.value,
        max_bad_fraction=_MAX_BAD_FRACTION.value,
        num_threads=_NUM_THREADS.value,
    )
    if _VERIFY.value:
        check_finished(job, job.settings())
        path = out / f"verified-{job.split}.png"
        save_png(path, draw_reconstructions(job))
        print(f"Originals (above) and reconstructions (below): {path}")
        return 0
    try:
        card = precompute(job)
    except KeyboardInterrupt:
        print(f"Stopped; finished shards are kept in {out}. Repeat the command to resume.", file=sys.stderr)
        return 128 + signal.SIGINT
    print(
        f"{card['num_records']:,} latents of {card['num_images']:,} images ({len(card['skipped'])} skipped) in {out}, "
        f"split {job.split!r}."
    )
    return 0


if __name__ == "__main__":
    cli.run(main, _FLAGS)
