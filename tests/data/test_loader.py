"""The order of the data is a pure function of the step, and every epoch holds every record once."""

import itertools
import threading

import numpy as np
import pytest

from diffussm_jax.data.loader import Loader, prefetch
from diffussm_jax.data.sources import Digits


class Numbers:
    """n records whose label is their index."""

    def __init__(self, n):
        self.n = n
        self.threads = set()

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        self.threads.add(threading.get_ident())
        return {"image": np.full((1, 1, 1), index, np.uint8), "label": np.int32(index)}


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


def test_no_records_are_refused():
    with pytest.raises(ValueError, match="no records"):
        Loader(Numbers(0), 4, seed=0)


def test_batches_are_stacked_records():
    batch = Loader(Numbers(10), 4, seed=0).batch(0)
    assert {name: (x.shape, x.dtype) for name, x in batch.items()} == {
        "image": ((4, 1, 1, 1), np.uint8),
        "label": ((4,), np.int32),
    }


@pytest.mark.parametrize("first_step", [0, 37])
def test_reading_ahead_by_threads_is_reading_by_step(first_step):
    records = Numbers(50)
    loader = Loader(records, 8, seed=2, num_threads=3)
    ahead = list(itertools.islice(loader.iterate(first_step), 20))
    assert threading.get_ident() not in records.threads
    for step, batch in enumerate(ahead, first_step):
        np.testing.assert_array_equal(batch["label"], loader.batch(step)["label"])


def test_processes_share_the_rows_of_every_batch():
    whole = Loader(Numbers(50), 8, seed=2)
    parts = [Loader(Numbers(50), 8, seed=2, rows=rows) for rows in (np.arange(5), np.arange(5, 8))]
    for step in range(100):
        rows = np.concatenate([part.batch(step)["label"] for part in parts])
        np.testing.assert_array_equal(rows, whole.batch(step)["label"])


def test_an_error_in_a_record_reaches_the_reader():
    class Broken(Numbers):
        def __getitem__(self, index):
            if index == 3:
                raise ValueError("record 3 is broken")
            return super().__getitem__(index)

    batches = Loader(Broken(10), 2, seed=None).iterate(0)
    assert next(batches)["label"].tolist() == [0, 1]
    with pytest.raises(ValueError, match="record 3 is broken"):
        next(batches)


def test_draws_for_records_follow_from_their_place_and_are_not_those_of_the_order():
    """Philox fills a short seed up with zeros: [seed, epoch] of the order is [seed, epoch, 0], a first record."""
    seed, n, num_epochs = 5, 6, 3

    def augment(record, rng):
        return record | {"draws": rng.integers(2**62, size=4)}

    loader = Loader(Numbers(n), 4, seed, augment=augment)
    found = np.concatenate([loader.batch(step)["draws"] for step in range(n * num_epochs // 4 + 1)])[: n * num_epochs]
    assert len(np.unique(found)) == found.size
    orders = [np.random.Generator(np.random.Philox([seed, epoch])).integers(2**62, size=4) for epoch in range(9)]
    with_zero = np.random.Generator(np.random.Philox([seed, 2, 0])).integers(2**62, size=4)
    np.testing.assert_array_equal(with_zero, orders[2])
    assert not np.isin(found, orders).any()
    others = Loader(Numbers(n), 3, seed, augment=augment, rows=np.array([1]))
    np.testing.assert_array_equal(others.batch(4)["draws"][0], found[13])


def test_prefetch_keeps_the_order_and_starts_early():
    started = []

    def to_devices(batch):
        started.append(batch)
        return batch * 10

    batches = prefetch(iter(range(5)), to_devices, depth=2)
    assert next(batches) == 0 and started == [0, 1, 2]
    assert list(batches) == [10, 20, 30, 40]


def test_digits_are_scikit_learns_split_in_ten():
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    train, held_out = Digits("train"), Digits("eval")
    assert (len(train), len(held_out)) == (1618, 179)
    image, label, *_ = held_out[0]
    assert (image.shape, image.dtype, label) == ((8, 8, 1), np.uint8, labels[9])
    np.testing.assert_allclose(image.ravel() / 255 * 16, images[9], atol=0.04)
    with pytest.raises(ValueError, match="unknown split 'test'"):
        Digits("test")
