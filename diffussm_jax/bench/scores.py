"""`bench scores`: time and peak memory of precision and recall, beside what NumPy and scikit-learn programs do.

Each method runs in a process of its own, so that the peak is that of the method, its features and its libraries.
"""

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np

from diffussm_jax.bench.measure import machine_name
from diffussm_jax.evaluation import precision_recall

Shape = tuple[int, int, int]  # N samples, M references, d dimensions
DEFAULT_SHAPE: Shape = (50_000, 10_000, 2048)
K = 3
_NUMPY_ROWS = 5_000


def parse_shape(text: str) -> Shape:
    """50000x10000x2048 to (50000, 10000, 2048); ValueError for anything else."""
    parts = text.strip().split("x")
    if len(parts) != 3 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"a shape is N x M x d, such as 50000x10000x2048; got {text!r}")
    return tuple(int(part) for part in parts)


def random_features(shape: Shape) -> tuple[np.ndarray, np.ndarray]:
    """Samples [N, d] and references [M, d], float32: of 24 latent dimensions with noise, clipped at 0 as by a ReLU."""
    N, M, d = shape
    generator = np.random.default_rng(0)
    mixing = generator.standard_normal((24, d), np.float32) / 5
    return tuple(
        np.maximum(
            (scale * generator.standard_normal((n, 24), np.float32)) @ mixing
            + 0.1 * generator.standard_normal((n, d), np.float32),
            0,
        )
        for n, scale in ((N, 0.9), (M, 1.0))
    )


def _numpy_way(samples: np.ndarray, reference: np.ndarray) -> tuple[float, float]:
    """Float32 distances of 5,000 rows to all others, and a partition: as ADM's evaluator, without its float16."""
    norms = {id(x): np.square(x).sum(axis=1) for x in (samples, reference)}

    def blocks(a, b):
        for start in range(0, len(a), _NUMPY_ROWS):
            rows = slice(start, start + _NUMPY_ROWS)
            distances = a[rows] @ b.T
            distances *= -2
            distances += norms[id(a)][rows, None]
            distances += norms[id(b)]
            yield rows, np.maximum(distances, 0, out=distances)

    def radii_of(x):
        return np.concatenate([np.partition(d, K, axis=1)[:, K].copy() for _, d in blocks(x, x)])  # a view keeps all

    radii = [radii_of(x) for x in (samples, reference)]
    is_sample_inside, is_reference_inside = np.zeros(len(samples), bool), np.zeros(len(reference), bool)
    for rows, distances in blocks(samples, reference):
        is_sample_inside[rows] = (distances <= radii[1]).any(axis=1)
        is_reference_inside |= (distances <= radii[0][rows, None]).any(axis=0)
    return float(is_sample_inside.mean()), float(is_reference_inside.mean())


def _sklearn_way(samples: np.ndarray, reference: np.ndarray) -> tuple[float, float]:
    """scikit-learn's brute-force neighbours for the radii, and its pairwise distances in chunks for the rest."""
    from sklearn.metrics import pairwise_distances_chunked
    from sklearn.neighbors import NearestNeighbors

    radii = [
        NearestNeighbors(n_neighbors=K + 1, algorithm="brute").fit(x).kneighbors(x)[0][:, K]
        for x in (samples, reference)
    ]
    is_sample_inside, is_reference_inside = [], np.zeros(len(reference), bool)
    start = 0
    for distances in pairwise_distances_chunked(samples, reference, working_memory=500):
        is_sample_inside.append((distances <= radii[1]).any(axis=1))
        is_reference_inside |= (distances <= radii[0][start : start + len(distances), None]).any(axis=0)
        start += len(distances)
    return float(np.concatenate(is_sample_inside).mean()), float(is_reference_inside.mean())


def _own_way(mode: str) -> Callable[[np.ndarray, np.ndarray], tuple[float, float]]:
    def score(samples, reference):
        found = precision_recall(samples, reference, k=K, mode=mode)
        return found.precision, found.recall

    return score


METHODS: dict[str, Callable[[np.ndarray, np.ndarray], tuple[float, float]]] = {
    "float32": _own_way("float32"),
    "adm_float16": _own_way("adm_float16"),
    "numpy": _numpy_way,
    "sklearn": _sklearn_way,
}


def measure_here(method: str, shape: Shape) -> dict[str, str | float]:
    """A row of `bench_scores`, measured in this process, and the machine's name."""
    samples, reference = random_features(shape)
    start, cpu_start = time.perf_counter(), time.process_time()
    precision, recall = METHODS[method](samples, reference)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    times = {"method": method, "seconds": seconds, "cpu_seconds": cpu_seconds, "peak_gb": peak / 1e9}
    return {"machine": machine_name()} | times | {"precision": precision, "recall": recall}


def bench_scores(shape: Shape, method: str) -> dict[str, str | float]:
    """Time, peak memory of the process and result of one method of `METHODS`, in a new process.

    Returns:
      machine; method; seconds of the first call, with compilation; cpu_seconds, of all cores, which depend less on
      other work of the machine; peak_gb, of the host; precision; recall.

    Raises:
      ValueError: the method is unknown.
      subprocess.CalledProcessError: it failed, for example for lack of memory.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; choose from {', '.join(METHODS)}")
    program = f"from diffussm_jax.bench.scores import *; print(json.dumps(measure_here({method!r}, {shape})))"
    done = subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def print_scores(shapes: Sequence[Shape], methods: Sequence[str]) -> list[dict]:
    """Prints a line for each shape and method, with differences from the first method; returns the rows."""
    rows = []
    for shape in shapes:
        of_shape = []
        for method in methods:
            of_shape.append(row := bench_scores(shape, method))
            if len(of_shape) == 1:
                print(f"{row['machine']}; precision and recall, k = {K}, N x M x d = {'x'.join(map(str, shape))}")
            first = of_shape[0]
            row["time_ratio"], row["cpu_ratio"] = (row[x] / first[x] for x in ("seconds", "cpu_seconds"))
            print(_line(row, first), flush=True)
        rows += [{"N": shape[0], "M": shape[1], "d": shape[2]} | row for row in of_shape]
    return rows


def _line(row: dict, first: dict) -> str:
    times = f"{row['seconds']:8.1f} s ({row['time_ratio']:.2f} x {first['method']})"
    cpu = f"CPU {row['cpu_seconds']:.1f} s ({row['cpu_ratio']:.2f} x), peak {row['peak_gb']:.2f} GB"
    results = ", ".join(f"{x} {row[x]:.5f} ({row[x] - first[x]:+.5f})" for x in ("precision", "recall"))
    return f"{row['method']:>12} {times}, {cpu}, {results}"
