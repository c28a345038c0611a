"""A folder of images is enough to train: classes, splits, size and channels are found in it."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from programs import run_program

from diffussm_jax import main, plan
from diffussm_jax.config import load_config
from diffussm_jax.data_config import complete_from_data, left_to_data
from diffussm_jax.validation import validate

CONFIG = str(Path(__file__).parent.parent / "configs" / "folder.py")


def make_images(folder, counts, size=(20, 24), is_gray=False):
    """Noise images, `counts` of them in each subfolder."""
    rng = np.random.default_rng(0)
    for name, count in counts.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pixels = rng.integers(0, 256, (*size, 1 if is_gray else 3), np.uint8)
            Image.fromarray(np.broadcast_to(pixels, (*size, 3))).save(folder / name / f"{i:02d}.png")


def completed(path, **changes):
    config = load_config(CONFIG)
    config.data.update(path=str(path), **changes)
    config, lines = complete_from_data(config)
    assert not left_to_data(config)
    validate(config)
    return config.data, "\n".join(lines)


def test_classes_size_and_channels_are_found(tmp_path):
    make_images(tmp_path, {"cat": 8, "dog": 9})
    data, lines = completed(tmp_path)
    assert (data.num_classes, data.image_size, data.num_channels) == (2, 16, 3)
    assert (data.split, data.eval_split, data.holdout) == ("", "", 0.1)
    assert "config.data.num_classes = 2: cat, dog" in lines and "shorter side of 17 images is 20 pixels" in lines


def test_gray_images_and_no_classes(tmp_path):
    make_images(tmp_path, {"": 5}, size=(300, 200), is_gray=True)
    data, _ = completed(tmp_path)
    assert (data.num_classes, data.image_size, data.num_channels) == (0, 64, 1)


@pytest.mark.parametrize(
    ("held_out", "expected"),
    [
        ({"test/cat": 2, "test/dog": 2}, ("train", "test", 0.0)),
        ({"test/cat": 2, "test/dog": 2, "val/cat": 1, "val/dog": 1}, ("train", "val", 0.0)),
        ({"test": 3}, ("train", "", 0.1)),  # without classes, as of a competition
        ({"truck": 3}, ("", "", 0.1)),  # "train" is a class
    ],
)
def test_train_beside_test_is_a_split(tmp_path, held_out, expected):
    classes = {"train": 5} if "truck" in held_out else {"train/cat": 5, "train/dog": 5}
    make_images(tmp_path, classes | held_out)
    data, _ = completed(tmp_path)
    assert (data.split, data.eval_split, data.holdout) == expected


def test_what_is_given_stays(tmp_path):
    make_images(tmp_path, {"cat": 8, "dog": 9})
    data, lines = completed(tmp_path, image_size=8, num_channels=1, eval_split="dog", split="cat")
    assert (data.image_size, data.num_channels) == (8, 1)
    assert (data.split, data.eval_split, data.holdout) == ("cat", "dog", 0.0)
    assert "image_size" not in lines


def test_errors_name_the_cause(tmp_path):
    with pytest.raises(ValueError, match="needs a path: give --config.data.path"):
        completed("")
    with pytest.raises(FileNotFoundError, match="no data at"):
        completed(tmp_path / "nothing")
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="none of the images that were tried can be read, such as a.png"):
        completed(tmp_path)
    with pytest.raises(ValueError, match="found in the data when training starts.*config.data.num_classes"):
        validate(load_config(CONFIG))


@pytest.mark.slow
def test_one_command_trains_on_a_folder(tmp_path):
    make_images(tmp_path / "images", {"cat": 8, "dog": 9}, is_gray=True)
    settings = {"model.width": 16, "model.depth": 1, "num_steps": 2, "batch_size": 4, "sampling.num_steps": 2}
    arguments = [f"--config.{key}={value}" for key, value in settings.items()]
    code, printed = run_program(
        main.main,
        f"--config={CONFIG}:XS",
        f"--workdir={tmp_path / 'run'}",
        f"--config.data.path={tmp_path / 'images'}",
        *arguments,
        flag_values=main._FLAGS,
    )
    assert code == 0, printed
    assert "folder images: 17 images, " in printed and "config.data.num_channels = 1" in printed
    assert "16 x 16 x 1 input" in printed
    code, printed = run_program(plan.main, f"--config={CONFIG}", "--topology=v5e-1", flag_values=plan._FLAGS)
    assert code == 1 and "needs a path" in printed
