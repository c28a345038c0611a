"""`bench versus_torch`: a training step and a sampling step of DiT-S/2 and of a small ADM U-Net, beside PyTorch.

Both programs have the same weights, inputs of 32 x 32 x 4, float32 and all cores. A training step is a forward pass,
the mean squared error against given targets, the gradients of all parameters and an update of AdamW. A sampling step is
a forward pass without gradients. PyTorch runs eagerly, with its own fused attention, as the published networks do.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from diffussm_jax.bench.measure import machine_name, median_seconds
from diffussm_jax.bench.yardsticks import torch_left_out
from diffussm_jax.models import DIT_SIZES, Backbone, DiT, UNet
from diffussm_jax.options import check_names

INPUT_SHAPE = (32, 32, 4)
NUM_CLASSES = 1000
LEARNING_RATE = 1e-4
STEPS = ("train", "sample")
_UNET = {
    "width": 64,
    "channel_mult": (1, 2, 3, 4),
    "num_res_blocks": 2,
    "attention_resolutions": (16,),
    "num_head_channels": 32,
    "resblock_updown": True,
}


class Pair(NamedTuple):
    """A network twice.

    Attributes:
      ours: the model.
      in_torch: () -> the module (x_t [B, C, H, W], t [B], y [B]) -> [B, 2 C, H, W].
    """

    ours: Backbone
    in_torch: Callable


def _torch_dit(**size):
    from diffussm_jax.bench.torch_dit import TorchDiT

    return TorchDiT(latent_size=INPUT_SHAPE[0], num_classes=NUM_CLASSES, **size)


def _torch_unet(**size):
    from diffussm_jax.bench.torch_unet import TorchUNet

    return TorchUNet(INPUT_SHAPE[0], INPUT_SHAPE[2], num_classes=NUM_CLASSES, **size)


def dit(size: str = "S/2", **changes) -> Pair:
    """DiT of a named size."""
    sizes = {**DIT_SIZES[size], **changes}
    return Pair(DiT(**sizes), lambda: _torch_dit(**sizes))


def unet(**changes) -> Pair:
    """A small U-Net of ADM's kind."""
    sizes = {**_UNET, **changes}
    return Pair(UNet(**sizes), lambda: _torch_unet(**sizes))


MODELS: Mapping[str, Callable[[], Pair]] = MappingProxyType({"dit": dit, "unet": unet})


def random_batch(batch_size: int) -> dict[str, np.ndarray]:
    """x_t, t, label, and a target for each output, of our layout."""
    generator, (H, W, C) = np.random.default_rng(0), INPUT_SHAPE
    return {
        "x_t": generator.standard_normal((batch_size, H, W, C), np.float32),
        "t": generator.integers(0, 1000, batch_size, np.int32),
        "label": generator.integers(0, NUM_CLASSES, batch_size, np.int32),
        "target": generator.standard_normal((batch_size, H, W, 2 * C), np.float32),
    }


def our_programs(model: Backbone, params: Mapping, batch: Mapping) -> tuple[Callable, Callable]:
    """() -> loss after a training step, which changes its own state; and () -> the output for the first parameters."""
    optimizer = optax.adamw(LEARNING_RATE, weight_decay=0.0)
    params, batch = jax.device_put((params, batch))

    def apply(params, batch):
        return model.apply_params(params, batch["x_t"], batch["t"], {"label": batch["label"]})

    def step(state, batch):
        params, opt_state = state
        loss, grads = jax.value_and_grad(lambda p: jnp.mean((apply(p, batch) - batch["target"]) ** 2))(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    step, forward_pass = jax.jit(step, donate_argnums=0), jax.jit(apply)
    state = jax.tree.map(jnp.copy, (params, optimizer.init(params)))  # donated: apart from what the forward pass reads

    def train():
        nonlocal state
        state, loss = step(state, batch)
        return loss, state

    return train, lambda: forward_pass(params, batch)


def torch_programs(network, batch: Mapping[str, np.ndarray]) -> tuple[Callable, Callable]:
    """The same in PyTorch. A copy of the network is trained."""
    import copy

    import torch

    torch.set_num_threads(os.cpu_count())
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # ours is exact float32, too
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    trained, network = copy.deepcopy(network).to(device), network.to(device).eval()
    x_t, target = (
        torch.from_numpy(batch[key]).permute(0, 3, 1, 2).contiguous().to(device) for key in ("x_t", "target")
    )
    t, label = (torch.from_numpy(batch[key]).long().to(device) for key in ("t", "label"))
    parameters = [p for p in trained.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)

    def finished(x):
        if device == "cuda":
            torch.cuda.synchronize()
        return x

    def train():
        optimizer.zero_grad(set_to_none=True)
        loss = ((trained(x_t, t, label) - target) ** 2).mean()
        loss.backward()
        optimizer.step()
        return finished(loss.detach())

    def sample():
        with torch.inference_mode():
            return finished(network(x_t, t, label).permute(0, 2, 3, 1))

    return train, sample


def _random_network(pair: Pair):
    """PyTorch's network with random weights, also where it starts at zero, and its tensors."""
    import torch

    torch.manual_seed(0)
    network = pair.in_torch()
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad and parameter.ndim > 1:
                parameter.normal_(0, 0.02)
    return network, {name: tensor.numpy() for name, tensor in network.state_dict().items()}


def bench_versus_torch(pair: Pair, *, batch_size: int = 4, repeats: int = 5) -> list[dict[str, str | float | None]]:
    """Times both steps of a network here and in PyTorch, in turns.

    Args:
      pair: `dit` or `unet`.
      batch_size: images.
      repeats: timed repetitions; the median counts.

    Returns:
      A row for each step: step, jax_ms, torch_ms, ratio (how many times faster ours is) and difference: of the outputs
      relative to the largest, for "train" of the first losses. Without PyTorch the last three are None.
    """
    batch = random_batch(batch_size)
    programs: dict[tuple[str, str], Callable] = {}
    if torch_left_out():
        params = pair.ours.init_params(INPUT_SHAPE, 0)
    else:
        network, tensors = _random_network(pair)
        params = pair.ours.from_pytorch(tensors)
        programs |= zip((("torch", step) for step in STEPS), torch_programs(network, batch), strict=True)
    programs |= zip((("jax", step) for step in STEPS), our_programs(pair.ours, params, batch), strict=True)
    first = {key: program() for key, program in programs.items()}
    times = {key: 1e3 * time for key, time in median_seconds(programs, repeats).items()}
    rows = []
    for step in STEPS:
        row = {"step": step, "jax_ms": times["jax", step], "torch_ms": times.get(("torch", step))}
        row |= {"ratio": None, "difference": None}
        if row["torch_ms"] is not None:
            ours = np.asarray(first["jax", step][0] if step == "train" else first["jax", step])
            difference = np.abs(first["torch", step].cpu().numpy() - ours).max() / np.abs(ours).max()
            row |= {"ratio": row["torch_ms"] / row["jax_ms"], "difference": float(difference)}
        rows.append(row)
    return rows


def print_versus_torch(names: Sequence[str], *, batch_size: int, repeats: int) -> list[dict]:
    """Prints and returns the rows of `bench_versus_torch` for several of `MODELS`, with batch_size and model."""
    check_names(names, MODELS, "network of versus_torch")
    problem, rows = torch_left_out(), []
    print(f"{machine_name()}; {batch_size} x {'x'.join(map(str, INPUT_SHAPE))}, float32, medians of {repeats}")
    print(f"{'model':>8} {'step':>8} {'JAX':>11} {'PyTorch':>11} {'ratio':>6} {'difference':>11}")
    for name in names:
        for row in bench_versus_torch(MODELS[name](), batch_size=batch_size, repeats=repeats):
            line = f"{name:>8} {row['step']:>8} {row['jax_ms']:8.1f} ms "
            if row["torch_ms"] is not None:
                line += f"{row['torch_ms']:8.1f} ms {row['ratio']:6.2f} {row['difference']:11.1e}"
            print(line.rstrip(), flush=True)
            rows.append({"model": name, "batch_size": batch_size, **row})
    if problem:
        print(f"without PyTorch: {problem} (extra parity)")
    return rows
