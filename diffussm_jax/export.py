"""Exports the weights of a run: python -m diffussm_jax.export --workdir=runs/digits --out=exports/digits

Writes a folder with model.safetensors (the averaged parameters), config.json, and README.md, a model card.
`load_run(FOLDER)` and `diffussm_jax.sample --workdir=FOLDER` open it, and any program that reads safetensors. With
--push_to_hub=USER/NAME (extra hub) the folder is uploaded to the Hugging Face hub; --dry_run only lists what would be.

Published PyTorch weights of DiT, ADM and latent diffusion become such a folder too:

    python -m diffussm_jax.export --out=exports/dit \\
      --config=configs/dit_imagenet256.py:XL/2 --weights=DiT-XL-2-256x256.pt

and --pytorch writes the other way, pytorch.safetensors with the names of the original code.

Of a run that trains an autoencoder it writes the folder vae, in diffusers' format, and the report of reconstructions.
"""

import contextlib
import json

import safetensors.numpy
from absl import app, flags
from etils import epath
from ml_collections import ConfigDict

from diffussm_jax import cli
from diffussm_jax.autoencoder_report import REPORT, VAE, finish_run
from diffussm_jax.build import Parts
from diffussm_jax.build_autoencoder import report_extractor
from diffussm_jax.config import best_checkpoint, to_plain
from diffussm_jax.io import check_same_shapes, check_writable, shapes_by_path, write_whole
from diffussm_jax.parallel.mesh import make_mesh
from diffussm_jax.run import Run, load_run, read_config
from diffussm_jax.tensor_files import read_tensors
from diffussm_jax.training.checkpoint import Checkpointer
from diffussm_jax.training.loop import CONFIG_NAME
from diffussm_jax.validation import validate
from diffussm_jax.weights import WEIGHTS, write_weights

CARD = "README.md"
PYTORCH = "pytorch.safetensors"
_FLAGS = flags.FlagValues()  # of its own, so that several programs can be imported together
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a run of diffussm_jax.main.", flag_values=_FLAGS)
_OUT = flags.DEFINE_string("out", None, "Folder to write; it must not hold an export yet.", flag_values=_FLAGS)
_CHECKPOINT, _EMA_SIGMA = cli.define_checkpoint(_FLAGS)
_CONFIG = cli.define_config(_FLAGS)
_WEIGHTS = flags.DEFINE_string(
    "weights",
    None,
    "File of published PyTorch weights, .pt, .pth, .ckpt, .safetensors or .npz, to export with --config in place of a "
    "run of --workdir.",
    flag_values=_FLAGS,
)
_PYTORCH = flags.DEFINE_bool(
    "pytorch", False, f"Whether to write {PYTORCH} too, by the names of the original PyTorch code.", flag_values=_FLAGS
)
_PUSH_TO_HUB = flags.DEFINE_string(
    "push_to_hub", None, "Repository of the Hugging Face hub, USER/NAME, to upload the folder to.", flag_values=_FLAGS
)
_DRY_RUN = flags.DEFINE_bool(
    "dry_run", False, "Whether to list the files of --push_to_hub in place of uploading them.", flag_values=_FLAGS
)


def export(run: Run, out: epath.PathLike, *, source: str = "", has_pytorch: bool = False) -> epath.Path:
    """Writes model.safetensors, config.json and README.md. The weights are last, so that an export is whole.

    The config keeps no path of the data, or of the run that it started from.

    Args:
      run: to export.
      out: the folder.
      source: see `model_card`.
      has_pytorch: whether to write pytorch.safetensors too.

    Raises:
      FileExistsError: the folder holds an export.
      ValueError: the model has no published layout of PyTorch.
    """
    out = epath.Path(out)
    if (out / WEIGHTS).exists():
        raise FileExistsError(f"{out} holds an export already; choose another --out")
    config = run.config.copy_and_resolve_references()
    config.data.path = config.init_from = ""
    tensors = run.model.to_pytorch(run.params, run.parts.input_shape) if has_pytorch else {}
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / CONFIG_NAME, json.dumps(to_plain(config), indent=2))
    write_whole(out / CARD, model_card(run, source))
    if has_pytorch:
        write_whole(out / PYTORCH, safetensors.numpy.save(tensors, metadata={"format": "pt"}))
    write_weights(out, run.params, run.step)
    return out


def export_autoencoder(workdir: epath.PathLike, checkpoint: str, out: epath.PathLike) -> epath.Path:
    """Writes OUT/vae and the report of a checkpoint of an autoencoder's run, as the run does at its end.

    Raises:
      FileExistsError: the folder holds an export.
      FileNotFoundError: there is no such checkpoint, or the images cannot be had.
    """
    out, config = epath.Path(out), read_config(workdir)
    if (out / VAE).exists():
        raise FileExistsError(f"{out} holds an autoencoder already; choose another --out")
    config.mesh.update({"data": -1, "fsdp": 1, "tensor": 1})
    validate(config)
    parts = Parts(config, make_mesh())
    best = best_checkpoint(config)
    with contextlib.closing(Checkpointer(workdir, best=best, is_read_only=True)) as checkpointer:
        step = checkpointer.resolve(checkpoint)
        params = checkpointer.restore_ema(step, parts.task.abstract_state.ema_params)
    finish_run(parts, report_extractor(parts), params, out, step)
    return out


def import_pytorch(config: ConfigDict, weights: epath.PathLike) -> Run:
    """A run whose weights are published ones of PyTorch, read by the backbone's `from_pytorch`. Nothing is unpickled.

    Args:
      config: of the model that the weights are of.
      weights: a file (`tensor_files.read_tensors`).

    Raises:
      FileNotFoundError: there is no file.
      ValueError: it is damaged, or not of this model. The message lists the differences.
    """
    validate(config)
    parts = Parts(config, make_mesh(), has_decoder=False)
    tensors, _ = read_tensors(weights)
    params = parts.model.from_pytorch(tensors)
    expected = shapes_by_path(parts.model.abstract_params(parts.input_shape))
    check_same_shapes(expected, shapes_by_path(params), f"{weights} does not hold the parameters of this model")
    return Run(parts, params, step=0)


def model_card(run: Run, source: str = "") -> str:
    """The model card, Markdown with the hub's metadata in front.

    Args:
      run: that is exported.
      source: the file that weights of others come from; "" for weights of the run's own training.
    """
    config, costs = run.config, run.model.costs(run.parts.input_shape)
    H, W, C = run.parts.input_shape
    classes = f"{config.data.num_classes} classes" if config.data.num_classes else "unconditional"
    rows = {
        "parameters": f"{sum(costs.parameters.values()):,}",
        "input": f"{H} x {W} x {C}" + (f", latents of `{config.data.vae}`" if run.parts.has_latents else ", pixels"),
        "conditions": classes,
        "data": f"`{config.data.source}`, images of {config.data.image_size} pixels",
        **({} if source else {"steps": f"{run.step:,} of batch size {config.batch_size}"}),
        "process, target": f"{config.diffusion.schedule}, {config.diffusion.target}",
    }
    origin = f"Weights of `{source}`, converted for" if source else "Averaged (EMA) weights of a run of"
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"""---
library_name: diffussm_jax
tags: [diffusion, state-space-model, jax]
---

# {type(run.model).__name__}, {H} x {W} x {C}, {classes}

{origin} `diffussm_jax`, an implementation of DiffuSSM (arXiv 2311.18257).

| | |
|---|---|
{table}

```python
from diffussm_jax import load_run

images, labels = load_run("FOLDER").sample(16)
```

`{WEIGHTS}` names each tensor by its path in the parameter tree, such as `blocks/W0/kernel`; `{CONFIG_NAME}` holds every
setting of the run.
"""


def push(folder: epath.Path, repository: str, *, is_dry_run: bool) -> None:
    """Uploads an export to the Hugging Face hub, or lists what would be uploaded.

    Raises:
      ValueError: the package huggingface_hub is not installed.
    """
    files = (WEIGHTS, CONFIG_NAME, CARD)
    if is_dry_run:
        sizes = "".join(f"\n  {name}: {(folder / name).stat().length:,} bytes" for name in files)
        print(f"Would upload to https://huggingface.co/{repository}:{sizes}")
        return
    try:
        import huggingface_hub
    except ImportError as error:
        raise ValueError("--push_to_hub needs huggingface_hub: pip install 'diffussm_jax[hub]'") from error
    huggingface_hub.create_repo(repository, exist_ok=True)
    huggingface_hub.upload_folder(repo_id=repository, folder_path=str(folder), allow_patterns=list(files))
    print(f"Uploaded to https://huggingface.co/{repository}.")


def main() -> int:
    """Exports a run, or published weights, and returns the exit code."""
    weights, config = _WEIGHTS.value, _CONFIG.value
    if not _OUT.value or bool(_WORKDIR.value) == bool(weights) or bool(weights) != (config is not None):
        raise app.UsageError(
            "give --workdir=FOLDER, the folder of a run, or --config=FILE with --weights=FILE; and --out=FOLDER"
        )
    repository = _PUSH_TO_HUB.value
    if repository is not None and len([part for part in repository.split("/") if part]) != 2:
        raise ValueError(f"--push_to_hub must be USER/NAME, got {repository!r}")
    check_writable(epath.Path(_OUT.value) / WEIGHTS)
    if not weights and read_config(_WORKDIR.value).task.name == "autoencoder":
        if _PYTORCH.value or repository or _EMA_SIGMA.value is not None:
            raise ValueError(
                "--pytorch, --push_to_hub and --ema_sigma are for diffusion models, not for an autoencoder"
            )
        out = export_autoencoder(_WORKDIR.value, _CHECKPOINT.value, _OUT.value)
        print(f"Wrote {VAE}/, {REPORT}.json and {REPORT}.md to {out}.")
        return 0
    if weights:
        run = import_pytorch(config, weights)
    else:
        run = load_run(_WORKDIR.value, _CHECKPOINT.value, ema_sigma=_EMA_SIGMA.value, has_decoder=False)
    source = epath.Path(weights).name if weights else ""
    out = export(run, _OUT.value, source=source, has_pytorch=_PYTORCH.value)
    print(f"Wrote {WEIGHTS}, {CONFIG_NAME} and {CARD} to {out}.")
    if repository:
        push(out, repository, is_dry_run=_DRY_RUN.value)
    return 0


if __name__ == "__main__":
    cli.run(main, _FLAGS)
