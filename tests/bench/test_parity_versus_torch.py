"""The networks that are timed beside PyTorch compute the same there."""

import pytest

from diffussm_jax.bench import bench_versus_torch, versus_torch

PAIRS = {
    "dit": {"width": 16, "depth": 2, "num_heads": 2},
    "unet": {
        "width": 16,
        "channel_mult": (1, 1),
        "attention_resolutions": (),
        "num_res_blocks": 1,
        "num_head_channels": 8,
        "norm_num_groups": 4,
    },
}


@pytest.mark.parametrize("name", PAIRS)
def test_parity_of_both_steps(name):
    pytest.importorskip("torch", reason="PyTorch is not installed (extra parity)")
    train, sample = bench_versus_torch(versus_torch.MODELS[name](**PAIRS[name]), batch_size=1, repeats=1)
    assert (train["step"], sample["step"]) == ("train", "sample")
    assert train["difference"] < 1e-5 and sample["difference"] < 1e-5
    assert train["ratio"] == pytest.approx(train["torch_ms"] / train["jax_ms"])


def test_parity_without_pytorch_ours_is_timed(monkeypatch, capsys):
    monkeypatch.setattr(versus_torch, "torch_left_out", lambda: "PyTorch is not installed")
    monkeypatch.setattr(versus_torch, "MODELS", {"dit": lambda: versus_torch.dit(**PAIRS["dit"])})
    rows = versus_torch.print_versus_torch(["dit"], batch_size=1, repeats=1)
    assert [row["torch_ms"] for row in rows] == [None, None] and rows[0]["jax_ms"] > 0
    assert "without PyTorch: PyTorch is not installed (extra parity)" in capsys.readouterr().out
    with pytest.raises(ValueError, match="network of versus_torch"):
        versus_torch.print_versus_torch(["unet"], batch_size=1, repeats=1)
