"""A suite as a plan: what each config would need of another machine. Nothing is trained."""

from collections.abc import Callable, Sequence
from typing import Any

from diffussm_jax.compare.page import Block, Table, Text
from diffussm_jax.compare.suite import Suite
from diffussm_jax.data_config import complete_from_data
from diffussm_jax.parallel.topology import Machine
from diffussm_jax.plan import DoesNotFitError, Plan, as_flags, make_plan, search

_GIB = 2**30


def plan_suite(
    suite: Suite, machine: Machine, names: Sequence[str], *, mfu: float, say: Callable[[str], None] = print
) -> list[dict[str, Any]]:
    """Compiles the training step of each config for a machine, with changes that save memory where it does not fit.

    Args:
      suite: whose budget gives the length of each run.
      machine: to compile for.
      names: of the configs.
      mfu: that is assumed for times.
      say: called with a line for each config.

    Returns:
      A row for each config: "name", and "error", or figures. "chip_hours" are those of the suite's budget,
      "own_chip_hours" those of the config's own number of steps.
    """
    rows = []
    for name in names:
        config, _ = complete_from_data(suite.configs[name])
        try:
            found = make_plan(config, machine), {}
        except DoesNotFitError as error:
            say(f"{name}: does not fit: {error}")
            found = search(config, machine)
        if found is None:
            rows.append({"name": name, "error": f"no change was found with which it fits {machine.name}"})
        else:
            rows.append({"name": name, **_figures(suite, *found, config.num_steps * config.batch_size, mfu)})
            say(f"{name}: {rows[-1]['peak_gib']:.2f} GiB, {rows[-1]['chip_hours']:,.0f} chip-hours")
    return rows


def _figures(suite: Suite, plan: Plan, change: dict[str, object], own_images: int, mfu: float) -> dict[str, Any]:
    rate, batch_size, total = plan.images_per_second(mfu), plan.batch_size, plan.costs.total
    step_ms = 1e3 * batch_size / rate
    num_steps = suite.budget.num_steps(batch_size=batch_size, multiply_adds=total, step_ms=step_ms)
    chips = plan.num_devices / plan.machine.chip.devices_per_chip
    hours, own_hours = num_steps * batch_size / rate / 3600, own_images / rate / 3600
    return {
        "parameters": sum(plan.costs.parameters.values()),
        "multiply_adds": total,
        "batch_size": batch_size,
        "peak_gib": plan.peak_bytes / _GIB,
        "change": as_flags(change),
        "step_ms": step_ms,
        "images_per_second": rate,
        "num_images": num_steps * batch_size,
        "hours": hours,
        "chip_hours": hours * chips,
        "own_images": own_images,
        "own_chip_hours": own_hours * chips,
    }


def plan_blocks(suite: Suite, machine: Machine, rows: Sequence[dict[str, Any]], *, mfu: float) -> list[Block]:
    """The rows as a table for a page."""
    limit = machine.chip.memory_bytes / _GIB
    header = ["config", "M parameters", "G multiply-adds an image", "batch", f"peak, GiB of {limit:.2f}", "fits with"]
    header += ["images/s", f"days for {suite.budget}", "chip-hours", "images of its own config, M", "their chip-hours"]
    cells = []
    for row in rows:
        if "error" in row:
            cells.append([row["name"], *["-"] * 4, row["error"], *["-"] * 5])
            continue
        cells.append(
            [
                row["name"],
                f"{row['parameters'] / 1e6:,.1f}",
                f"{row['multiply_adds'] / 1e9:.1f}",
                str(row["batch_size"]),
                f"{row['peak_gib']:.2f}",
                row["change"] or "as it is",
                f"{row['images_per_second']:,.0f}",
                f"{row['hours'] / 24:.1f}",
                f"{row['chip_hours']:,.0f}",
                f"{row['own_images'] / 1e6:,.0f}",
                f"{row['own_chip_hours']:,.0f}",
            ]
        )
    text = (
        f"Nothing here is measured. Memory is that of programs compiled for {machine.name}. Times follow from counted "
        f"multiply-adds, DiffuSSM's sequence mixers excluded, at an assumed MFU of {mfu:.0%}. Real models reach it to "
        "different degrees (docs/plan.md)."
    )
    return [*([Text(suite.notes)] if suite.notes else []), Text(text), Table(header, cells)]
