"""The order of the data is a pure function of the step, and every epoch holds every record once."""

import numpy as np
import pytest

from diffussm_jax.data.loader import Loader
from diffussm_jax.data.sources import Digits


class Numbers:
    """A source of n one-pixel images whose label is their index."""

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        return np.full((1, 1, 1), index, np.uint8), index


@pytest.mark.parametrize("n,batch_size", [(10, 4), (10, 10), (7, 20), (1, 3)])
def test_every_epoch_holds_every_record_once(n, batch_size):
    loader = Loader(Numbers(n), batch_size, seed=3)
    num_epochs = 4 * batch_size
    rows = np.concatenate([loader.batch(s)["label"] for s in range(n * 4)])
    assert len(rows) == num_epochs * n
    epochs = rows.reshape(num_epochs, n)
    np.testing.assert_array_equal(np.sort(epochs, 1), np.tile(np.arange(n), (num_epochs, 1)))


def test_batches_depend_on_step_and_seed_alone():
    a, b = Loader(Numbers(100), 8, seed=0), Loader(Numbers(100), 8, seed=0)
    for step in range(30):
        a.batch(step)
    np.testing.assert_array_equal(a.batch(17)["label"], b.batch(17)["label"])
    assert (Loader(Numbers(100), 8, seed=1).batch(17)["label"] != b.batch(17)["label"]).any()
    epochs = [np.concatenate([a.batch(s)["label"] for s in range(k * 25, k * 25 + 25)]) for k in (0, 1)]
    assert (epochs[0] != epochs[1]).any()


def test_without_a_seed_the_order_is_the_sources():
    loader = Loader(Numbers(10), 4, seed=None)
    assert len(loader) == 3
    np.testing.assert_array_equal(loader.batch(2)["label"], [8, 9, 0, 1])


def test_an_empty_source_is_refused():
    with pytest.raises(ValueError, match="no images"):
        Loader(Numbers(0), 4, seed=0)


def test_digits_are_scikit_learns_split_in_ten():
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    train, held_out = Digits("train"), Digits("eval")
    assert (len(train), len(held_out)) == (1618, 179)
    image, label = held_out[0]
    assert (image.shape, image.dtype, label) == ((8, 8, 1), np.uint8, labels[9])
    np.testing.assert_allclose(image.ravel() / 255 * 16, images[9], atol=0.04)
    with pytest.raises(ValueError, match="unknown split 'test'"):
        Digits("test")
