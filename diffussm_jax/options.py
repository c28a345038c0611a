"""What a config may set of a component, written where the component is defined.

An option of a dataclass, a Flax module or a function is a field or an argument with a plain default: a bool, int,
float, string or tuple. Its annotation may say more:

    @dataclasses.dataclass(frozen=True)
    class DDIM:
        eta: Annotated[float, Range(0, 1)] = 0.0

    class DiffuSSM(nn.Module):
        remat: Annotated[str, Choices(REMAT_POLICIES), CHANGEABLE_ON_RESUME] = "none"
        mixer: Annotated[Factory, Component("mixer", "s4d")] = S4D     # a component of its own, with its options
        platform: Annotated[str | None, NOT_AN_OPTION] = None

The defaults of a config group, the checks of its values and what may change on resume all follow from these.
"""

import dataclasses
import difflib
import inspect
import math
import sys
import typing
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

NOT_AN_OPTION = "not an option"
CHANGEABLE_ON_RESUME = "changeable on resume"
_MAX_LISTED = 30
_LARGEST = {int: 2**63 - 1, float: 3.4e38}  # of NumPy's int64 and of float32
_PLAIN = (bool, int, float, str, tuple)


class Range(NamedTuple):
    """Finite numbers in [low, high]."""

    low: float
    high: float = math.inf


@dataclasses.dataclass(frozen=True, init=False)
class Choices:
    """One of these names; a mapping gives the names by its keys."""

    names: tuple[str, ...]

    def __init__(self, names: Iterable[str]):
        object.__setattr__(self, "names", tuple(names))


class Component(NamedTuple):
    """The option is itself a component of this kind, chosen by name, `default` if the config does not say."""

    kind: str
    default: str


@dataclasses.dataclass(frozen=True)
class Option:
    """One option of a component: its default and what its annotation says."""

    default: Any
    type: type
    range: Range | None = None
    choices: Choices | None = None
    component: Component | None = None
    is_changeable_on_resume: bool = False

    def check(self, name: str, value: Any) -> None:
        """Raises ValueError, naming the option and the value, if the value is not allowed."""
        if self.choices and value not in self.choices.names:
            raise ValueError(f"{name} is {value!r}; choose one of {', '.join(self.choices.names)}")
        if self.type in (bool, str, tuple) and not isinstance(value, self.type):
            raise ValueError(f"{name} must be a {self.type.__name__}, got {value!r}")
        if self.type is int and (not isinstance(value, int) or isinstance(value, bool)):
            raise ValueError(f"{name} must be a whole number, got {value!r}")
        if self.type is float and (not isinstance(value, int | float) or isinstance(value, bool)):
            raise ValueError(f"{name} must be a number, got {value!r}")
        if self.type not in (int, float):
            return
        low, high = self.range or (-math.inf, math.inf)
        kind = "a whole number" if self.type is int else "a number"
        if not low <= value <= high:
            allowed = f"{kind} of at least {low}" if high == math.inf else f"from {low} to {high}"
            raise ValueError(f"{name} must be {allowed}, got {value!r}")
        if abs(value) > _LARGEST[self.type] and abs(value) != math.inf:
            raise ValueError(f"{name} must be at most {_LARGEST[self.type]}, got {value!r}")
        if self.type is float and not math.isfinite(value):
            raise ValueError(f"{name} must be finite, got {value!r}")


def _annotated_defaults(component) -> Iterable[tuple[str, Any, Any]]:
    """(name, annotation, default) of each dataclass field or keyword argument that has a default."""
    if dataclasses.is_dataclass(component):
        for field in dataclasses.fields(component):
            if field.init and field.default is not dataclasses.MISSING:
                yield field.name, _evaluated(field.type, component), field.default
        return
    for parameter in inspect.signature(component).parameters.values():
        if parameter.default is not inspect.Parameter.empty:
            yield parameter.name, _evaluated(parameter.annotation, component), parameter.default


def _evaluated(annotation, component):
    """An annotation that is a string, as `from __future__ import annotations` makes them, as what it stands for."""
    if not isinstance(annotation, str):
        return annotation
    return eval(annotation, vars(sys.modules[component.__module__]))


def options_of(component) -> dict[str, Option]:
    """The options of a dataclass, Flax module or function, by name, in the order of their definition."""
    options = {}
    for name, annotation, default in _annotated_defaults(component):
        extras = annotation.__metadata__ if typing.get_origin(annotation) is typing.Annotated else ()
        found = {type(extra): extra for extra in extras}
        is_option = isinstance(default, _PLAIN) or Component in found
        if not is_option or NOT_AN_OPTION in extras:
            continue
        stated = typing.get_args(annotation)[0] if extras else annotation
        kind = stated if stated in _PLAIN else type(default)
        options[name] = Option(
            default=kind(default) if kind is float else default,
            type=kind,
            range=found.get(Range),
            choices=found.get(Choices),
            component=found.get(Component),
            is_changeable_on_resume=CHANGEABLE_ON_RESUME in extras,
        )
    return options


def check_options(component, values: Mapping[str, Any] | None = None, *, without: Iterable[str] = ()) -> None:
    """Raises ValueError if an option of a component is not allowed.

    Args:
      component: a function or class; or an instance, whose own values are checked.
      values: of the options, by name.
      without: options that are not checked.
    """
    kind = component if values is not None else type(component)
    for name, option in options_of(kind).items():
        if not option.component and name not in without:
            option.check(name, values[name] if values is not None else getattr(component, name))


def check_names(names: Iterable[str], known: Iterable[str], what: str) -> None:
    """Raises ValueError, naming the nearest known name (and all if they are few), if one of `names` is not known."""
    known = sorted(known)
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f' Did you mean "{near[0]}"?' if near else ""
            choices = f"; choose one of {', '.join(known)}" if len(known) <= _MAX_LISTED else ""
            raise ValueError(f"unknown {what} {name!r}{choices}.{hint}")


def flatten(values: Mapping, prefix: str = "") -> dict[str, Any]:
    """The values of nested groups under dotted keys, "model.depth"; an empty group stays as it is."""
    items = {}
    for key, value in values.items():
        if hasattr(value, "items") and len(value):
            items.update(flatten(value, f"{prefix}{key}."))
        else:
            items[prefix + key] = value
    return items
