"""An exported run gives the same samples bit by bit, and is read without this package too."""

import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
from programs import run_program

from diffussm_jax import export as program
from diffussm_jax import load_run
from diffussm_jax.build import Parts
from diffussm_jax.config import load_config, override
from diffussm_jax.io import path_of

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.fixture(scope="module")
def exported(tiny_run, tmp_path_factory):
    out = tmp_path_factory.mktemp("exports") / "digits"
    arguments = (f"--workdir={tiny_run}", f"--out={out}", "--push_to_hub=someone/digits", "--dry_run")
    code, printed = run_program(program.main, *arguments, flag_values=program._FLAGS)
    assert code == 0, printed
    size = (out / "model.safetensors").stat().st_size
    assert f"Would upload to https://huggingface.co/someone/digits:\n  model.safetensors: {size:,} bytes" in printed
    return out


def test_samples_are_the_same_bit_by_bit(exported, tiny_run):
    run, again = load_run(tiny_run), load_run(exported)
    assert again.step == run.step == 12
    np.testing.assert_array_equal(again.sample(4)[0], run.sample(4)[0])
    assert sorted(path.name for path in exported.iterdir()) == ["README.md", "config.json", "model.safetensors"]


def test_any_reader_of_safetensors_finds_the_tensors_by_their_paths(exported, tiny_run):
    tensors = safetensors.numpy.load_file(exported / "model.safetensors")
    leaves = jax.tree_util.tree_leaves_with_path(load_run(tiny_run).params)
    assert set(tensors) == {path_of(path) for path, _ in leaves} and "blocks/W0/kernel" in tensors
    for path, leaf in leaves:
        np.testing.assert_array_equal(tensors[path_of(path)], leaf)


def test_the_card_and_the_config_say_what_the_model_is(exported):
    card = (exported / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: diffussm_jax\n") and "| steps | 12 of batch size 8 |" in card
    config = json.loads((exported / "config.json").read_text())
    assert config["data"]["path"] == "" and config["model"]["width"] == 16


def test_what_is_damaged_or_of_another_model_is_named(exported, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((exported / name).read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["model"]["width"] = 32
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=r"model.safetensors does not hold the parameters of this model(.|\n)*W0/kernel"
    ):
        load_run(tmp_path)
    for content in (b"", b"\x00" * 7, (exported / "model.safetensors").read_bytes()[:-5]):
        (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match="model.safetensors is damaged, or no export"):
            load_run(tmp_path)
    for options in ({"checkpoint": "4"}, {"ema_sigma": 0.1}):
        with pytest.raises(ValueError, match="is an export, and holds one set of weights"):
            load_run(exported, **options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out=x"], "give --workdir=FOLDER"),
        (["--workdir=x"], "and --out=FOLDER"),
        (["--workdir=RUN", "--out=EXPORT"], "holds an export already"),
        (["--workdir=RUN", "--out=TMP/x", "--push_to_hub=name"], "must be USER/NAME, got 'name'"),
        (["--workdir=TMP", "--out=TMP/x"], "holds no run"),
    ],
)
def test_wrong_requests_are_named(arguments, message, exported, tiny_run, tmp_path):
    places = {"RUN": tiny_run, "EXPORT": exported, "TMP": tmp_path}
    arguments = [re.sub("RUN|EXPORT|TMP", lambda match: str(places[match[0]]), text) for text in arguments]
    code, printed = run_program(program.main, *arguments, flag_values=program._FLAGS)
    assert code == 1 and message in printed and "Traceback" not in printed


def dit_flags(tmp_path):
    return (f"--config={CONFIGS / 'digits.py'}", "--config.model.name=dit", "--config.model.width=16",
            "--config.model.depth=2", "--config.model.num_heads=2", "--config.sampling.num_steps=2",
            f"--weights={tmp_path / 'dit.npz'}")  # fmt: skip


def test_published_weights_become_an_export_and_go_back_bit_by_bit(tmp_path):
    config = override(load_config(str(CONFIGS / "digits.py")), {"model.name": "dit", "model.width": 16})
    config.model.update(depth=2, num_heads=2)
    parts = Parts(config)
    shapes = parts.model.abstract_params(parts.input_shape)
    params = jax.tree.map(lambda leaf: np.random.default_rng(leaf.size).normal(size=leaf.shape) / 9, shapes)
    tensors = parts.model.to_pytorch(params, parts.input_shape)
    np.savez(tmp_path / "dit.npz", **tensors)
    arguments = (*dit_flags(tmp_path), f"--out={tmp_path / 'out'}", "--pytorch")
    code, printed = run_program(program.main, *arguments, flag_values=program._FLAGS)
    assert code == 0, printed
    run = load_run(tmp_path / "out")
    jax.tree.map(lambda leaf, expected: np.testing.assert_array_equal(leaf, np.float32(expected)), run.params, params)
    assert run.sample(3)[0].shape == (3, 8, 8, 1)
    assert "Weights of `dit.npz`, converted for" in (tmp_path / "out" / "README.md").read_text()
    again = safetensors.numpy.load_file(tmp_path / "out" / "pytorch.safetensors")
    assert again.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(again[name], tensor)


@pytest.mark.parametrize(
    "flags,message",
    [
        (("--config.model.width=32",), "does not hold the parameters of this model"),
        (("--config.model.name=diffussm",), "DiffuSSM has no published layout of PyTorch"),
    ],
)
def test_weights_of_another_model_are_refused(flags, message, tmp_path):
    test_published_weights_become_an_export_and_go_back_bit_by_bit(tmp_path)
    given = [flag for flag in dit_flags(tmp_path) if flag.partition("=")[0] not in {f.partition("=")[0] for f in flags}]
    if "name" in flags[0]:
        given = [flag for flag in given if "num_heads" not in flag]
    arguments = (*given, *flags, f"--out={tmp_path / 'other'}")
    code, printed = run_program(program.main, *arguments, flag_values=program._FLAGS)
    assert code == 1 and message in printed and not (tmp_path / "other" / "model.safetensors").exists()
