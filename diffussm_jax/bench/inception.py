"""`bench inception`: images per second of the FID Inception, beside the same network in PyTorch if it is installed."""

import os

import jax
import jax.numpy as jnp
import numpy as np

from diffussm_jax.bench.measure import machine_name, median_seconds
from diffussm_jax.bench.yardsticks import torch_left_out
from diffussm_jax.evaluation.inception import IMAGE_SIZE, Inception, params_of

OURS, TORCH = "jax", "torch"


def bench_inception(*, batch_size: int = 32, image_size: int = 256, repeats: int = 5) -> list[dict]:
    """Times the network on random weights, in turns with PyTorch's, both in float32.

    Ours is timed from uint8 images to all outputs. PyTorch's is given images that were resized and scaled before, and
    computes the 2048 features only.

    Args:
      batch_size: images of a call.
      image_size: pixels of an image, before the resize to 299.
      repeats: timed repetitions; the median counts.

    Returns:
      A row for each program: program, images_per_second, ratio (ours to it), and difference, the largest between the
      features, relative to the largest feature.
    """
    images = np.random.default_rng(0).integers(0, 256, (batch_size, image_size, image_size, 3), np.uint8)
    model = Inception()
    with_torch = not torch_left_out()
    if with_torch:
        tensors, torch_program = _torch_program(images)
        params = params_of(tensors)
    else:
        params = jax.jit(model.init)(jax.random.key(0), images[:1])["params"]
    params, on_device = jax.device_put((params, images))
    apply = jax.jit(lambda params, images: model.apply({"params": params}, images))
    programs = {OURS: lambda: apply(params, on_device)} | ({TORCH: torch_program} if with_torch else {})
    outputs = {name: program() for name, program in programs.items()}
    features = np.asarray(outputs[OURS]["features"])
    differences = {OURS: 0.0}
    if with_torch:
        differences[TORCH] = float(np.abs(outputs[TORCH].cpu().numpy() - features).max() / features.max())
    times = median_seconds(programs, repeats)
    return [
        {
            "program": name,
            "images_per_second": batch_size / time,
            "ratio": time / times[OURS],
            "difference": differences[name],
        }
        for name, time in times.items()
    ]


def _torch_program(images: np.ndarray):
    """The tensors of a network in PyTorch with random weights, and () -> its features of the resized images."""
    import torch

    from diffussm_jax.bench.torch_inception import TorchInception
    from diffussm_jax.evaluation.resize import resize_tf1_bilinear

    torch.set_num_threads(os.cpu_count())
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # ours is exact float32, too
    torch.manual_seed(0)
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    network = TorchInception().eval()
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    tensors = {name: x.numpy() for name, x in network.state_dict().items() if x.is_floating_point()}
    network.to(device)
    resized = (resize_tf1_bilinear(jnp.asarray(images), IMAGE_SIZE, IMAGE_SIZE) - 128) / 128
    x = torch.from_numpy(np.array(resized)).permute(0, 3, 1, 2).contiguous().to(device)

    def program():
        with torch.inference_mode():
            features = network(x)
        if device == "cuda":
            torch.cuda.synchronize()
        return features

    return tensors, program


def print_inception(**options) -> list[dict]:
    """Prints and returns the rows of `bench_inception`. The ratio is how many times faster ours is."""
    print(f"{machine_name()}; float32, medians of {options.get('repeats', 5)}")
    rows = bench_inception(**options)
    print(f"{'program':>8} {'images/s':>10} {'jax to it':>10} {'difference':>11}")
    for row in rows:
        figures = f"{row['images_per_second']:10.2f} {row['ratio']:10.2f} {row['difference']:11.1e}"
        print(f"{row['program']:>8} {figures}", flush=True)
    if len(rows) == 1:
        print(f"without PyTorch: {torch_left_out()}")
    return rows
