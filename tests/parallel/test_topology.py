"""Names of machines, and the facts of their chips. Compiling for them is tested in tests/test_plan.py."""

import pytest

from diffussm_jax.parallel.topology import CHIPS, parse_machine, peak_flops


@pytest.mark.parametrize(
    "name,chip,shape,num_devices",
    [
        ("v5e:16x16", "v5e", (16, 16), 256),
        ("v5e-256", "v5e", (16, 16), 256),
        ("v5litepod-256", "v5e", (16, 16), 256),
        ("v5e-128", "v5e", (8, 16), 128),
        ("v5e-8", "v5e", (2, 4), 8),
        ("v5e-1", "v5e", (1, 1), 1),
        ("v6e-64", "v6e", (8, 8), 64),
        ("V6E:2x2", "v6e", (2, 2), 4),
        ("v4-8", "v4", (2, 2, 1), 4),
        ("v4:2x2x1", "v4", (2, 2, 1), 4),
        ("v4-16", "v4", (2, 2, 2), 8),
        ("v4-64", "v4", (2, 4, 4), 32),
        ("v4-512", "v4", (4, 8, 8), 256),
        ("v5p-128", "v5p", (4, 4, 4), 64),
        ("v4:4x4x12", "v4", (4, 4, 12), 192),
        ("v3-8", "v3", (2, 2), 8),
        ("v2-32", "v2", (4, 4), 32),
        ("tpu7x:2x2x1", "tpu7x", (2, 2, 1), 8),
        ("h100", "h100", (1, 1), 1),
        ("h100:8", "h100", (1, 8), 8),
        ("h200:64", "h200", (8, 8), 64),
        ("a100:2", "a100", (1, 2), 2),
    ],
)
def test_names(name, chip, shape, num_devices):
    machine = parse_machine(name)
    assert (machine.chip.name, machine.shape, machine.num_devices) == (chip, shape, num_devices)


@pytest.mark.parametrize(
    "name,message",
    [
        ("v7:2x2", "v2, v3, v4, v5e, v5p, v6e, tpu7x, h100, h200, a100"),
        ("", "unknown machine ''"),
        ("v5e:16*16", "unknown machine 'v5e:16\\*16'"),
        ("v5e:4x4x4", "have 2 axes, such as v5e:2x4"),
        ("v4:4x4", "have 3 axes, such as v4:2x2x4"),
        ("v4", "power of two TensorCores, such as v4-8"),
        ("v4-7", "power of two TensorCores"),
        ("v4-24", "by their shape, v4:2x2x2"),
        ("v5e-100", "power of two chips, such as v5e-4"),
        ("v5e-0", "at least one"),
        ("v5e:0x2", "at least one"),
        ("v5e:512x512", "have 256 chips"),
        ("v6e-512", "have 256 chips"),
        ("h100:9", "multiple of 8"),
        ("h100-8", "h100:8"),
        ("h100:2x4", "h100:8"),
    ],
)
def test_other_names_are_refused_with_what_is_allowed(name, message):
    with pytest.raises(ValueError, match=message):
        parse_machine(name)


def test_peaks_by_device_kind():
    # CONTRIBUTING, "Style", and the makers' data sheets; a device of a v3 chip is one of its two cores.
    peaks = {"NVIDIA H100 80GB HBM3": 989, "NVIDIA H200": 989, "TPU v4": 275, "TPU v5 lite": 197, "TPU v5": 459}
    peaks |= {"TPU v6 lite": 918, "TPU v3": 61.5}
    for device_kind, tera_flops in peaks.items():
        assert peak_flops(device_kind) == tera_flops * 1e12
    assert peak_flops("cpu") is None


def test_chips_have_sensible_facts():
    for chip in CHIPS.values():
        assert 2**32 < chip.memory_bytes < 2**38
        assert 10 < chip.peak_flops / chip.memory_bandwidth < 1000  # FLOP a byte
