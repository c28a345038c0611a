"""The choice of a method from a table."""

import sys

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas

from diffussm_jax.ssm import METHODS, init_s4d, ssm_apply, to_complex
from diffussm_jax.ssm.auto import UNMEASURED, Measurement, fastest_method, read_table


def row(L, D, method, ms, platform="gpu", dtype="float32", N=64):
    return Measurement(platform, "a device", dtype, 1, L, D, N, method, ms)


TABLE = [
    row(256, 384, "fft", 1.0), row(256, 384, "chunked", 2.0),
    row(4096, 384, "fft", 9.0), row(4096, 384, "chunked", 5.0),
    row(4096, 1152, "fft", 20.0), row(4096, 1152, "chunked", 30.0),
    row(4096, 1152, "associative", 3.0, platform="cpu"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("platform", "L", "D", "expected"),
    [
        ("gpu", 256, 384, "fft"),
        ("gpu", 1000, 384, "fft"),  # nearer to 256 than to 4096 in log L
        ("gpu", 1100, 384, "chunked"),
        ("gpu", 100_000, 500, "chunked"),
        ("gpu", 5000, 2000, "fft"),
        ("cpu", 7, 8, "associative"),
        ("tpu", 1024, 384, UNMEASURED["tpu"]),
    ],
)
def test_the_nearest_measured_shape_decides(platform, L, D, expected):
    assert fastest_method(platform, "float32", L, D, 64, TABLE) == expected


def test_rows_of_another_dtype_serve_where_there_are_none():
    assert fastest_method("gpu", "bfloat16", 4096, 384, 64, TABLE) == "chunked"
    half = [*TABLE, row(4096, 384, "fft", 1.0, dtype="bfloat16")]
    assert fastest_method("gpu", "bfloat16", 4096, 384, 64, half) == "fft"
    assert fastest_method("gpu", "float32", 4096, 384, 64, half) == "chunked"


def test_the_packaged_table_names_methods_that_exist():
    table = read_table()
    assert {"cpu"} <= {row.platform for row in table} <= {"cpu", "gpu", "tpu"}
    assert {row.method for row in table} <= set(METHODS) - {"auto"}
    assert {row.L for row in table if row.platform == "cpu"} >= {256, 65_536}
    assert set(UNMEASURED.values()) <= set(METHODS)


def test_a_table_of_other_columns_is_refused(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("method,ms\nfft,1\n")
    with pytest.raises(ValueError, match="must have the columns platform,device,.*, got method,ms"):
        read_table(path)


def test_a_row_that_is_no_measurement_is_named(tmp_path):
    path = tmp_path / "table.csv"
    for line in ("cpu,cpu,float32,1,256,384,64,fft", "cpu,cpu,float32,1,256,384,64,fft,fast"):
        path.write_text(f"{','.join(Measurement._fields)}\n{line}\n")
        with pytest.raises(ValueError, match=f"table.csv, line 2, is no measurement: {line}"):
            read_table(path)


def test_on_gpus_the_choice_needs_no_triton(monkeypatch):
    """JAX has deprecated that part of Pallas, which only `pallas` is compiled by."""
    monkeypatch.setitem(sys.modules, "jax.experimental.pallas.triton", None)
    monkeypatch.delattr(pallas, "triton", raising=False)
    for module in ("pallas_gpu", "pallas_gpu_kernels"):
        monkeypatch.delitem(sys.modules, f"diffussm_jax.ssm.{module}", raising=False)
    params = to_complex(init_s4d(jax.random.key(0), 3, 8))

    def output(method):
        return jax.eval_shape(lambda u: ssm_apply(params, u, method=method, platform="gpu"), jnp.zeros((1, 70, 3)))

    assert output("auto").shape == (1, 70, 3)
    with pytest.raises(ValueError, match="needs Pallas's Triton backend.*choose 'auto' or 'chunked'"):
        output("pallas")
