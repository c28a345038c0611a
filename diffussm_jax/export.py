"""Exports the weights of a run: python -m diffussm_jax.export --workdir=runs/digits --out=exports/digits

Writes a folder with model.safetensors (the averaged parameters), config.json, and README.md, a model card.
`load_run(FOLDER)` and `diffussm_jax.sample --workdir=FOLDER` open it, and any program that reads safetensors. With
--push_to_hub=USER/NAME (extra hub) the folder is uploaded to the Hugging Face hub; --dry_run only lists what would be.
"""

import json

from absl import app, flags
from etils import epath

from diffussm_jax import cli
from diffussm_jax.config import to_plain
from diffussm_jax.io import check_writable, write_whole
from diffussm_jax.run import Run, load_run
from diffussm_jax.training.loop import CONFIG_NAME
from diffussm_jax.weights import WEIGHTS, write_weights

CARD = "README.md"
_FLAGS = flags.FlagValues()  # of its own, so that several programs can be imported together
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a run of diffussm_jax.main.", flag_values=_FLAGS)
_OUT = flags.DEFINE_string("out", None, "Folder to write; it must not hold an export yet.", flag_values=_FLAGS)
_CHECKPOINT, _EMA_SIGMA = cli.define_checkpoint(_FLAGS)
_PUSH_TO_HUB = flags.DEFINE_string(
    "push_to_hub", None, "Repository of the Hugging Face hub, USER/NAME, to upload the folder to.", flag_values=_FLAGS
)
_DRY_RUN = flags.DEFINE_bool(
    "dry_run", False, "Whether to list the files of --push_to_hub in place of uploading them.", flag_values=_FLAGS
)


def export(run: Run, out: epath.PathLike) -> epath.Path:
    """Writes model.safetensors, config.json and README.md. The weights are last, so that an export is whole.

    The config keeps no path of the data, or of the run that it started from.

    Raises:
      FileExistsError: the folder holds an export.
    """
    out = epath.Path(out)
    if (out / WEIGHTS).exists():
        raise FileExistsError(f"{out} holds an export already; choose another --out")
    config = run.config.copy_and_resolve_references()
    config.data.path = config.init_from = ""
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / CONFIG_NAME, json.dumps(to_plain(config), indent=2))
    write_whole(out / CARD, model_card(run))
    write_weights(out, run.params, run.step)
    return out


def model_card(run: Run) -> str:
    """The model card, Markdown with the hub's metadata in front."""
    config, costs = run.config, run.model.costs(run.parts.input_shape)
    H, W, C = run.parts.input_shape
    classes = f"{config.data.num_classes} classes" if config.data.num_classes else "unconditional"
    rows = {
        "parameters": f"{sum(costs.parameters.values()):,}",
        "input": f"{H} x {W} x {C}" + (f", latents of `{config.data.vae}`" if run.parts.has_latents else ", pixels"),
        "conditions": classes,
        "data": f"`{config.data.source}`, images of {config.data.image_size} pixels",
        "steps": f"{run.step:,} of batch size {config.batch_size}",
        "process, target": f"{config.diffusion.schedule}, {config.diffusion.target}",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"""---
library_name: diffussm_jax
tags: [diffusion, state-space-model, jax]
---

# {type(run.model).__name__}, {H} x {W} x {C}, {classes}

Averaged (EMA) weights of a run of `diffussm_jax`, an implementation of DiffuSSM (arXiv 2311.18257).

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
    """Exports a run, and returns the exit code."""
    if not _WORKDIR.value or not _OUT.value:
        raise app.UsageError("give --workdir=FOLDER, the folder of a run, and --out=FOLDER")
    repository = _PUSH_TO_HUB.value
    if repository is not None and len([part for part in repository.split("/") if part]) != 2:
        raise ValueError(f"--push_to_hub must be USER/NAME, got {repository!r}")
    check_writable(epath.Path(_OUT.value) / WEIGHTS)
    run = load_run(_WORKDIR.value, _CHECKPOINT.value, ema_sigma=_EMA_SIGMA.value, has_decoder=False)
    out = export(run, _OUT.value)
    print(f"Wrote {WEIGHTS}, {CONFIG_NAME} and {CARD} to {out}.")
    if repository:
        push(out, repository, is_dry_run=_DRY_RUN.value)
    return 0


if __name__ == "__main__":
    cli.run(main, _FLAGS)
