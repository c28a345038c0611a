"""The options of a component follow from its defaults and annotations, and are checked by them."""

import dataclasses
import math
from typing import Annotated

import flax.linen as nn
import pytest

from diffussm_jax.options import (
    CHANGEABLE_ON_RESUME,
    NOT_AN_OPTION,
    Choices,
    Component,
    Range,
    check_names,
    flatten,
    options_of,
)

POLICIES = {"none": None, "full": len}


def some_factory():
    return None


@dataclasses.dataclass(frozen=True)
class Solver:
    given: int
    order: Annotated[int, Range(1, 3)] = 2
    eta: Annotated[float, Range(0, 1)] = 0.0
    scale: Annotated[float, Range(0)] = 1.5
    free: float = 0.1
    use_noise: bool = True
    kind: Annotated[str, Choices(["ode", "sde"])] = "ode"
    sizes: tuple[int, ...] = (1, 2)
    clean: Annotated[float, NOT_AN_OPTION] = 0.0
    maybe: float | None = None
    listed: list = dataclasses.field(default_factory=list)
    derived: int = dataclasses.field(default=3, init=False)


class Model(nn.Module):
    num_channels: int
    depth: Annotated[int, Range(1)] = 4
    remat: Annotated[str, Choices(POLICIES), CHANGEABLE_ON_RESUME] = "none"
    mixer: Annotated[object, Component("mixer", "s4d")] = some_factory
    platform: Annotated[str | None, NOT_AN_OPTION] = None

    @nn.compact
    def __call__(self, x):
        return x


def schedule(num_given: int, num_steps: Annotated[int, Range(21, 100)] = 50, *, shape: str = "linear", other=None):
    return num_given, num_steps, shape, other


OPTIONS = options_of(Solver)


def test_options_are_fields_with_a_plain_default_in_order():
    assert list(OPTIONS) == ["order", "eta", "scale", "free", "use_noise", "kind", "sizes"]
    assert [option.default for option in OPTIONS.values()] == [2, 0.0, 1.5, 0.1, True, "ode", (1, 2)]
    assert [option.type for option in OPTIONS.values()] == [int, float, float, float, bool, str, tuple]


def test_what_an_annotation_says():
    assert OPTIONS["order"].range == Range(1, 3)
    assert OPTIONS["scale"].range == (0, math.inf)
    assert OPTIONS["kind"].choices.names == ("ode", "sde")
    assert OPTIONS["free"].range is OPTIONS["free"].choices is OPTIONS["free"].component is None
    assert not any(option.is_changeable_on_resume for option in OPTIONS.values())


def test_options_of_a_flax_module():
    """Not those that Flax adds, `parent` and `name`; and a factory is an option only as a component."""
    options = options_of(Model)
    assert list(options) == ["depth", "remat", "mixer"]
    assert options["remat"].choices.names == ("none", "full")
    assert [name for name, option in options.items() if option.is_changeable_on_resume] == ["remat"]
    assert options["mixer"].component == Component(kind="mixer", default="s4d")


def test_options_of_a_function():
    options = options_of(schedule)
    assert {name: option.default for name, option in options.items()} == {"num_steps": 50, "shape": "linear"}
    assert options["num_steps"].range == Range(21, 100)


@pytest.mark.parametrize(
    "name, values",
    [
        ("order", [1, 2, 3]),
        ("eta", [0, 1, 0.5, 1e-9]),
        ("scale", [0, 1e9]),
        ("free", [-1, 1e9, 3]),
        ("kind", ["ode", "sde"]),
        ("sizes", [(), (3, 4, 5)]),
        ("use_noise", [True, False]),
    ],
)
def test_allowed_values(name, values):
    for value in values:
        assert OPTIONS[name].check(name, value) is None


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("order", 0, "order must be from 1 to 3, got 0"),
        ("order", 4, "order must be from 1 to 3, got 4"),
        ("order", 2.0, "order must be a whole number, got 2.0"),
        ("order", True, "order must be a whole number, got True"),
        ("order", "2", "order must be a whole number, got '2'"),
        ("order", None, "order must be a whole number, got None"),
        ("eta", -1e-9, "eta must be from 0 to 1, got -1e-09"),
        ("eta", math.nan, "eta must be from 0 to 1, got nan"),
        ("eta", "half", "eta must be a number, got 'half'"),
        ("eta", True, "eta must be a number, got True"),
        ("scale", -1, "scale must be a number of at least 0, got -1"),
        ("scale", math.nan, "scale must be a number of at least 0, got nan"),
        ("scale", math.inf, "scale must be finite, got inf"),
        ("free", None, "free must be a number, got None"),
        ("free", -math.inf, "free must be finite, got -inf"),
        ("kind", "pde", "kind is 'pde'; choose one of ode, sde"),
    ],
)
def test_refused_values(name, value, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        OPTIONS[name].check(name, value)


def test_a_whole_number_of_at_least():
    with pytest.raises(ValueError, match="^depth must be a whole number of at least 1, got 0$"):
        options_of(Model)["depth"].check("depth", 0)


def test_unknown_names_come_with_the_nearest():
    check_names(["eta", "order"], OPTIONS, "option")
    with pytest.raises(
        ValueError, match=r"unknown option 'etaa'; choose one of eta, free, .*\. Did you mean \"eta\"\?"
    ):
        check_names(["order", "etaa"], OPTIONS, "option")
    with pytest.raises(ValueError, match=r"unknown option 'xyz'; .*use_noise\.$"):
        check_names(["xyz"], OPTIONS, "option")


def test_flatten():
    nested = {"a": 1, "b": {"c": 2, "d": {"e": (3, 4)}}, "empty": {}}
    assert flatten(nested) == {"a": 1, "b.c": 2, "b.d.e": (3, 4), "empty": {}}
