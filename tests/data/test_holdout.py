"""A part of the data is held out by a hash of the keys, whatever their order."""

import hashlib

import numpy as np
import pytest
from PIL import Image
from tiny import tiny_config

from diffussm_jax.build import Parts
from diffussm_jax.data.holdout import held_out
from diffussm_jax.data.sources import Digits, ImageFolder
from diffussm_jax.experiment import build_experiment
from diffussm_jax.training.loop import train
from diffussm_jax.validation import check_same_experiment, validate


class Keys:
    """A source of which only the keys are known."""

    description = "keys"

    def __init__(self, keys):
        self._keys = keys

    def __len__(self):
        return len(self._keys)

    def key(self, index):
        return self._keys[index]


def names(keys, fraction):
    return {key for key, is_chosen in zip(keys, held_out(Keys(keys), fraction), strict=True) if is_chosen}


def test_the_choice_follows_the_hash_alone():
    keys = [f"class_{i % 3}/{i}.png" for i in range(3000)]
    chosen = names(keys, 0.1)
    assert abs(len(chosen) - 300) < 60  # 3.6 standard deviations
    by_hand = {k for k in keys if int(hashlib.sha256(k.encode()).hexdigest()[:16], 16) < 0.1 * 2**64}
    assert chosen == by_hand
    assert names(keys[::-1], 0.1) == chosen
    assert names(keys[::2], 0.1) == chosen & set(keys[::2])  # without every other image
    assert chosen < names(keys, 0.2)


def test_a_few_images_leave_something_on_both_sides():
    assert len(names(["a", "b"], 0.001)) == 1
    with pytest.raises(ValueError, match="config.data.holdout = 0.1 leaves none of 1 items"):
        names(["a"], 0.1)
    with pytest.raises(ValueError, match="needs a source with keys; stripes has none"):
        held_out(type("Stripes", (), {"description": "stripes", "__len__": lambda self: 3})(), 0.1)


def test_training_and_held_out_records_are_apart(tmp_path):
    for i in range(40):
        folder = tmp_path / f"class_{i % 2}"
        folder.mkdir(exist_ok=True)
        Image.fromarray(np.full((4, 4, 3), i, np.uint8)).save(folder / f"{i}.png")
    config = tiny_config()
    config.data.update(source="images", path=str(tmp_path), split="", eval_split="", holdout=0.25, num_classes=2)
    config.data.update(image_size=4, num_channels=3)
    parts = Parts(config)
    seen = [
        {int(r["image"][0, 0, 0]) for r in map(records.__getitem__, range(len(records)))}
        for records in (
            parts.train_records,
            parts.eval_records,
        )
    ]
    assert seen[0] | seen[1] == set(range(40)) and not seen[0] & seen[1]
    source = ImageFolder(tmp_path)
    assert seen[1] == {int(source[i].image[0, 0, 0]) for i in np.flatnonzero(held_out(source, 0.25))}
    assert len(parts.eval_loader) == -(-len(seen[1]) // config.batch_size)


def test_a_run_has_a_held_out_loss_and_a_best_checkpoint(tmp_path):
    config = tiny_config()
    config.data.update(eval_split="", holdout=0.02)
    assert train(build_experiment(config), tmp_path) is None
    header, *rows = (tmp_path / "metrics.csv").read_text().splitlines()
    losses = [row.split(",")[header.split(",").index("eval_loss")] for row in rows]
    assert sum(map(bool, losses)) == 2
    assert len(Parts(config).train_records) + len(Parts(config).eval_records) == len(Digits("train"))


def test_it_is_part_of_the_experiment_and_0_for_runs_of_before():
    config = tiny_config()
    old = config.to_dict()
    del old["data"]["holdout"]
    check_same_experiment({"format": 2, **old}, {"format": 2, **config.to_dict()}, "runs/a")
    config.data.update(eval_split="", holdout=0.1)
    with pytest.raises(ValueError, match="config.data.holdout: was 0.0, is 0.1"):
        check_same_experiment({"format": 2, **old}, {"format": 2, **config.to_dict()}, "runs/a")


def test_two_held_out_sets_are_refused():
    config = tiny_config()
    config.data.holdout = 0.1
    with pytest.raises(ValueError, match="config.data.holdout = 0.1 .* eval_split = 'eval'"):
        validate(config)
