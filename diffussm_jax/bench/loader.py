"""`bench loader`: records per second of a data set of precompute, read in the shuffled order of training."""

import time

from diffussm_jax.data.latents import Latents
from diffussm_jax.data.loader import Loader


def bench_loader(folder: str, split: str, *, batch_size: int = 256, num_threads: int = 4) -> float:
    """Records per second of a `Loader` over one pass (at most 20,000 records), after a pass that warms the cache."""
    records = Latents(folder, split)
    batches = Loader(records, batch_size, 0, num_threads=num_threads).iterate(0)
    num_batches = max(1, min(len(records), 20_000) // batch_size)
    for _ in range(num_batches):
        next(batches)
    start = time.perf_counter()
    for _ in range(num_batches):
        next(batches)
    return num_batches * batch_size / (time.perf_counter() - start)
