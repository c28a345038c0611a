"""Where a run's numbers go: metrics.csv and TensorBoard event files in the work directory."""

import csv
import io

import numpy as np
from etils import epath
from tensorboardX import SummaryWriter

CSV_NAME = "metrics.csv"


class MetricsLog:
    """metrics.csv, a row for each step logged, and TensorBoard events.

    The file is written anew as a whole each time and put in place by renaming, so that it is never half there and
    needs no appending (which bucket storage does not have). After a resume each step stands there once.

    Args:
      workdir: of the run.
      resumed_step: rows after this step are dropped; they will be made again.
    """

    def __init__(self, workdir: epath.PathLike, resumed_step: int):
        self._path = epath.Path(workdir) / CSV_NAME
        self._rows: dict[int, dict[str, object]] = {}
        if self._path.exists():
            for row in csv.DictReader(io.StringIO(self._path.read_text())):
                if int(row["step"]) <= resumed_step:
                    self._rows[int(row["step"])] = row
        self._events = SummaryWriter(str(workdir), purge_step=resumed_step + 1)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Adds metrics to the row of a step, and to TensorBoard."""
        # repr of a float32 value keeps every bit, so that two runs can be compared.
        self._rows.setdefault(step, {"step": step}).update({k: repr(float(v)) for k, v in metrics.items()})
        for name, value in metrics.items():
            self._events.add_scalar(name, value, step)
        self._save()

    def _save(self) -> None:
        columns = list(dict.fromkeys(name for row in self._rows.values() for name in row))
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(self._rows[step] for step in sorted(self._rows))
        partial = self._path.parent / (CSV_NAME + ".partial")
        partial.write_text(text.getvalue())
        partial.replace(self._path)

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Shows [H, W, C] uint8 in TensorBoard."""
        self._events.add_image(name, image, step, dataformats="HWC")

    def close(self) -> None:
        """Flushes the event files."""
        self._events.close()
