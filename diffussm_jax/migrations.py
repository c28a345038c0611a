"""What configs saved by older versions mean today.

A saved config has the number of its format under "format"; without one it is format 1. Each migration turns a config of
one format into one of the next, and gives every key that is new the value that reproduces the old behaviour.
"""

from collections.abc import Callable, MutableMapping
from typing import Any

FORMAT = 2
_KEY = "format"

# Keys of format 1 that have other names now. The command line still takes the old ones.
MOVED = {
    "model.state_size": "model.mixer.state_size",
    "model.scan": "model.mixer.scan",
    "model.bidirectional": "model.mixer.bidirectional",
    "model.discretization": "model.mixer.discretization",
    "model.initialization": "model.mixer.initialization",
    "model.ssm_method": "model.mixer.method",
    "model.label_dropout": "conditioners.label.dropout",
}


def today(key: str) -> str:
    """The name that a dotted key has now."""
    return MOVED.get(key, key)


def stamp(values: dict) -> dict:
    """A plain config with the number of today's format."""
    return {_KEY: FORMAT, **values}


def migrate(values: dict) -> dict:
    """A plain config of any format as one of today's, without the number.

    Raises:
      ValueError: it was saved by a newer version.
    """
    values = dict(values)
    found = values.pop(_KEY, 1)
    if not isinstance(found, int) or not 1 <= found <= FORMAT:
        raise ValueError(f"the config has format {found!r}; this version reads formats 1 to {FORMAT}")
    for migration in _MIGRATIONS[found - 1 :]:
        values = migration(values)
    return values


def rename(values: MutableMapping) -> None:
    """Moves the values of keys that have other names now."""
    for old, new in MOVED.items():
        old_group, _, old_name = old.partition(".")
        if old_name in values[old_group]:
            *path, name = new.split(".")
            group = values
            for part in path:
                group = group[part]
            group[name] = values[old_group][old_name]
            del values[old_group][old_name]


def _to_2(values: dict) -> dict[str, Any]:
    """Groups for the mixer, conditioners, task and hooks; keys for what was fixed before."""
    groups = {key: dict(value) if isinstance(value, dict) else value for key, value in values.items()}
    groups["model"]["mixer"] = {"name": "s4d"}
    groups["conditioners"] = {"label": {"name": "label"}}
    rename(groups)
    groups["diffusion"] |= {"target": "noise", "has_learned_variance": True}
    eta = groups["sampling"].pop("eta")  # which only DDIM reads
    if groups["sampling"]["sampler"] == "ddim":
        groups["sampling"]["eta"] = eta
    return groups | {
        "task": {"name": "diffusion"},
        "hooks": {},
        "best_metric": "eval_loss",
        "best_mode": "min",
        "imports": [],
    }


_MIGRATIONS: tuple[Callable[[dict], dict], ...] = (_to_2,)
