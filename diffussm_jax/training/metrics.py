"""Logging of metrics: metrics.csv and TensorBoard event files in the work directory."""

import csv
import hashlib
import io
import shutil
import tempfile
from pathlib import Path

import jax
import numpy as np
from etils import epath
from tensorboardX import SummaryWriter

from diffussm_jax.io import is_bucket, write_whole

CSV_NAME = "metrics.csv"


class MetricsLog:
    """Writes metrics.csv (one row per logged step), TensorBoard events, and optionally Weights & Biases.

    metrics.csv is rewritten and renamed at each logged step. So it is always complete, and works in buckets, which
    cannot append. After a resume each step has one row. Event files for a bucket are written to a local folder and
    copied at each logged step. Only the first process writes.

    Args:
      resumed_step: rows after this step are dropped, because the run will log them again.
      wandb_project: a project of Weights & Biases (extra "wandb"). Its run resumes with this one.
      config: of the run, for Weights & Biases.

    Raises:
      ValueError: `wandb_project` is given and wandb is not installed.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        resumed_step: int,
        wandb_project: str | None = None,
        config: dict | None = None,
    ):
        self._is_writer = jax.process_index() == 0
        self._rows: dict[int, dict[str, object]] = {}
        self._wandb, self._copied = None, None
        if not self._is_writer:
            return
        workdir = epath.Path(workdir)
        self._path = workdir / CSV_NAME
        if self._path.exists():
            self._rows = {step: row for step, row in self._read().items() if step <= resumed_step}
        if wandb_project:
            self._wandb = _start_wandb(workdir, wandb_project, config)
        if is_bucket(workdir):
            self._copied = Path(tempfile.mkdtemp(prefix="events_")), workdir
        folder = str(self._copied[0] if self._copied else workdir)
        self._events = SummaryWriter(folder, purge_step=resumed_step + 1, filename_suffix=f".{resumed_step}")

    def _read(self) -> dict[int, dict[str, object]]:
        """The rows of the file by step. If a row cannot be read, the file is copied aside, and the others are used."""
        content, rows, num_damaged = self._path.read_bytes(), {}, 0
        text = content.decode("utf-8", "replace").replace("\0", "\ufffd")
        try:
            for row in csv.DictReader(io.StringIO(text, newline="")):
                step = row.get("step") or ""
                if step.isdecimal() and None not in row and "\ufffd" not in "".join(map(str, row.values())):
                    rows[int(step)] = {name: value or "" for name, value in row.items()}
                else:
                    num_damaged += 1
        except csv.Error:  # such as a field of 131,072 characters
            num_damaged += 1
        if num_damaged or not text.startswith("step"):
            aside = self._path.with_name(f"{self._path.name}.damaged")
            write_whole(aside, content)
            print(
                f"{self._path} is damaged, and was copied to {aside}. {len(rows)} rows can be read, "
                f"{num_damaged} cannot.",
                flush=True,
            )
        return rows

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Adds metrics to the row of a step, to TensorBoard, and to Weights & Biases."""
        metrics = {name: float(value) for name, value in metrics.items()}
        if not self._is_writer:
            return
        # repr keeps every bit of a float32 value, so that runs can be compared exactly.
        self._rows.setdefault(step, {"step": step}).update({k: repr(v) for k, v in metrics.items()})
        for name, value in metrics.items():
            self._events.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.log(metrics, step=step)
        self._copy_events()
        self._save()

    def _copy_events(self) -> None:
        if self._copied:
            self._events.flush()
            folder, workdir = self._copied
            for file in folder.iterdir():
                (workdir / file.name).write_bytes(file.read_bytes())

    def _save(self) -> None:
        columns = list(dict.fromkeys(name for row in self._rows.values() for name in row))
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(self._rows[step] for step in sorted(self._rows))
        write_whole(self._path, text.getvalue())

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Adds an image [H, W, C] uint8 to TensorBoard."""
        if self._is_writer:
            self._events.add_image(name, image, step, dataformats="HWC")

    def close(self) -> None:
        """Flushes and closes the files."""
        if not self._is_writer:
            return
        self._events.close()
        if self._copied:
            self._copy_events()
            shutil.rmtree(self._copied[0])
        if self._wandb:
            self._wandb.finish()


def _start_wandb(workdir: epath.Path, project: str, config: dict | None):
    try:
        import wandb
    except ImportError as error:
        raise ValueError("--wandb_project needs Weights & Biases: pip install -e '.[wandb]'") from error
    run_id = hashlib.sha256(str(workdir.absolute()).encode()).hexdigest()[:16]  # stable across resumes
    return wandb.init(project=project, name=workdir.name, id=run_id, resume="allow", config=config)
