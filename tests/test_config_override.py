"""`config.override`: values under dotted keys, as --set of the benchmarks and the search of plan give them."""

import pytest

from diffussm_jax.config import default_config, override
from diffussm_jax.validation import validate


def test_values_change_in_a_copy():
    config = default_config().lock()
    changed = override(config, {"model.depth": 3, "mesh.fsdp": 2, "sampling.guidance_interval": (0.0, 10.0)})
    assert (changed.model.depth, changed.mesh.fsdp, changed.sampling.guidance_interval) == (3, 2, (0.0, 10.0))
    assert (config.model.depth, config.mesh.fsdp) == (12, 1)


def test_old_names_of_keys_are_understood():
    changed = override(default_config(), {"model.ssm_method": "fft", "model.label_dropout": 0.2})
    assert (changed.model.mixer.method, changed.conditioners.label.dropout) == ("fft", 0.2)
    validate(changed)


def test_a_choice_brings_its_options_wherever_it_stands():
    changed = override(default_config(), {"sampling.eta": 0.5, "sampling.sampler": "ddim"})
    assert (changed.sampling.sampler, changed.sampling.eta) == ("ddim", 0.5)
    validate(changed)
    back = override(changed, {"sampling.sampler": "ddpm"})
    assert "eta" not in back.sampling
    validate(back)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"model.deph": 3}, "config.model.deph.*model.depth"),
        ({"sampling.eta": 0.5}, "sampling.eta"),  # DDPM has none
        ({"model.depth": "three"}, "depth.*three"),
        ({"sampling.sampler": "ddin"}, "config.sampling.sampler is 'ddin'.*ddim"),
        ({"model.name": "transformer"}, "config.model.name is 'transformer'"),
        ({"imports": ("no.such_module",)}, "no.such_module"),
    ],
)
def test_wrong_changes_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        override(default_config(), changes)
