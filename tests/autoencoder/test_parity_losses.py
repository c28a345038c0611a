"""One step against a discriminator is the same in PyTorch, float64, written from the formulas of `autoencoder.losses`.

A tiny convolutional autoencoder, KL or VQ, PatchGAN in training mode with real and reconstructed images in separate
passes, a perceptual distance, and R1. Losses, the adaptive factor, and the gradients of the autoencoder and of the
discriminator are compared, each parameter's in the Euclidean norm. Measured is 1.2e-6.

LPIPS is compared with VGG16 in PyTorch on random weights: 3e-7, and 6e-6 for its gradient (PyTorch's own in float32:
3e-6). In VGG16 a ReLU or a max pool now and then goes the other way in float32. That moves the gradient of an image by
1e-3, in PyTorch too. So the step has a perceptual distance without them, and of four images LPIPS may miss one.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import normal, relative_error
from random_tensors import random_tensor, random_tensors

from diffussm_jax.autoencoder import losses, lpips
from diffussm_jax.autoencoder.discriminator import PatchDiscriminator
from diffussm_jax.io import path_of

torch = pytest.importorskip("torch", reason="parity of the losses needs PyTorch")
functional = torch.nn.functional

TOLERANCE = 1e-5
B, SIZE, LATENTS, CODES = 2, 32, 2, 6
PERCEPTUAL_WEIGHT, DISC_WEIGHT, LOGVAR, KL_WEIGHT = 0.7, 0.5, 0.2, 0.01
CODEBOOK_WEIGHT, BETA = 0.8, 0.25
SHAPES = {  # of the autoencoder, in PyTorch's order
    "conv_in": (8, 3, 3, 3),
    "latent": (2 * LATENTS, 8, 3, 3),
    "hidden": (8, LATENTS, 3, 3),
    "conv_out": (3, 8, 3, 3),
}


FEATURES = {"kernel": normal(5, 5, 3, 3, 3) / 5, "head": np.abs(normal(6, 5))}  # of the step's perceptual distance


@functools.cache
def inputs():
    """Images and the noise of their latents, [B, C, H, W] float64."""
    x = np.tanh(normal(0, B, 3, SIZE, SIZE))
    return torch.tensor(x, dtype=torch.float64), torch.tensor(normal(1, B, LATENTS, SIZE, SIZE)).double()


def generator_tensors(is_vq):
    shapes = {f"{name}.weight": shape for name, shape in SHAPES.items()}
    if is_vq:
        shapes["latent.weight"] = (LATENTS, 8, 3, 3)
    found = random_tensors(shapes, seed=1)
    return found | ({"codebook": normal(2, CODES, LATENTS)} if is_vq else {"logvar": np.float32(LOGVAR)})


class TorchDiscriminator(torch.nn.Module):
    """PatchGAN, as its table in the paper of pix2pix: C64-C128-C256-C512, with strides 2, 2, 2, 1 and 1."""

    def __init__(self, width, num_layers, norm):
        super().__init__()
        layers, channels = [], 3
        for n in range(num_layers + 1):
            out, stride = width * min(2**n, 8), 2 if n < num_layers else 1
            layers.append(torch.nn.Conv2d(channels, out, 4, stride, 1, bias=n == 0 or norm == "group"))
            if n:
                layers.append(torch.nn.BatchNorm2d(out) if norm == "batch" else torch.nn.GroupNorm(out // 4, out))
            layers.append(torch.nn.LeakyReLU(0.2))
            channels = out
        self.main = torch.nn.Sequential(*layers, torch.nn.Conv2d(channels, 1, 4, 1, 1))

    def forward(self, x):
        return self.main(x)

    def to_jax(self, value=lambda p: p):
        """Parameters, or what `value` makes of them, in the layout of `PatchDiscriminator`."""
        tree, convs, norms = {}, itertools.count(), itertools.count(1)
        for layer in self.main:
            if isinstance(layer, torch.nn.LeakyReLU):
                continue
            is_conv = isinstance(layer, torch.nn.Conv2d)
            node = {"kernel" if is_conv else "scale": to_jax(value(layer.weight))}
            if layer.bias is not None:
                node["bias"] = to_jax(value(layer.bias))
            tree[f"conv_{next(convs)}" if is_conv else f"norm_{next(norms)}"] = node
        return tree


class TorchLPIPS(torch.nn.Module):
    """LPIPS 0.1 with VGG16, but epsilon inside the root."""

    def __init__(self, tensors):
        super().__init__()
        channels, layers = 3, []
        for width in (64, 64, "pool", 128, 128, "pool", *[256] * 3, "pool", *[512] * 3, "pool", *[512] * 3, "pool"):
            if width == "pool":
                layers.append(torch.nn.MaxPool2d(2))
            else:
                layers += [torch.nn.Conv2d(channels, width, 3, padding=1), torch.nn.ReLU()]
                channels = width
        self.features = torch.nn.Sequential(*layers)
        named = {name: torch.tensor(x) for name, x in tensors.items()}
        self.heads = [named[f"lin{i}.model.1.weight"].double() for i in range(5)]
        self.load_state_dict({name: x for name, x in named.items() if name.startswith("features")})
        self.double().requires_grad_(False)

    def maps(self, x):
        shift, scale = torch.tensor([[-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]], dtype=x.dtype)[:, :, None, None]
        x = (x - shift) / scale
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index in (3, 8, 15, 22, 29):
                yield x

    def forward(self, x, y):
        return torch_distance(self.maps(x), self.maps(y), self.heads)


def torch_distance(maps_x, maps_y, heads):
    def unit(f):
        return f / (f.square().sum(1, keepdim=True) + lpips.EPSILON).sqrt()

    triples = zip(maps_x, maps_y, heads, strict=True)
    return sum(functional.conv2d((unit(f) - unit(g)).square(), head).mean((1, 2, 3)) for f, g, head in triples)


def to_jax(tensor):
    x = tensor.detach().numpy().astype(np.float32)
    return x.transpose(2, 3, 1, 0) if x.ndim == 4 else x


def torch_step(generator, discriminator, case):
    """Scalars by name, and the gradients of both networks by name, from PyTorch's autograd."""
    is_vq, kind, r1_weight = case["is_vq"], case["loss"], case["r1_weight"]
    x, noise = inputs()
    p = {name: torch.tensor(value, dtype=torch.float64, requires_grad=True) for name, value in generator.items()}

    def conv(name, x):
        return functional.conv2d(x, p[f"{name}.weight"], padding=1)

    latents = conv("latent", functional.silu(conv("conv_in", x)))
    if is_vq:
        flat = latents.permute(0, 2, 3, 1)
        codes = p["codebook"][torch.cdist(flat.reshape(-1, LATENTS), p["codebook"]).argmin(1)].reshape(flat.shape)
        codebook, commitment = (flat.detach() - codes).square().mean(), (flat - codes.detach()).square().mean()
        regularizer = CODEBOOK_WEIGHT * (BETA * codebook + commitment)  # "legacy"
        z = (flat + (codes - flat).detach()).permute(0, 3, 1, 2)
    else:
        mean, logvar = latents.chunk(2, 1)
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum() / B
        regularizer, z = KL_WEIGHT * kl, mean + (logvar / 2).exp() * noise
    x_hat = conv("conv_out", functional.silu(conv("hidden", z)))

    kernel, head = (torch.tensor(value).double() for value in FEATURES.values())
    maps = ([functional.conv2d(z, kernel).tanh()] for z in (x, x_hat))
    distance = torch_distance(*maps, [head[None, :, None, None]])
    error = (x - x_hat).abs() + PERCEPTUAL_WEIGHT * distance[:, None, None, None]
    nll = error.mean() if is_vq else (error / p["logvar"].exp() + p["logvar"]).sum() / B
    g = -discriminator(x_hat).mean()
    last = p["conv_out.weight"]
    of_nll, of_g = (torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (nll, g))
    factor = (of_nll / (of_g + 1e-4)).clamp(0, 1e4).detach()
    total = nll + regularizer + DISC_WEIGHT * factor * g
    of_generator = torch.autograd.grad(total, list(p.values()))

    real = x.clone().requires_grad_()
    real_logits, fake_logits = discriminator(real), discriminator(x_hat.detach())
    if kind == "hinge":
        d = 0.5 * (functional.relu(1 - real_logits).mean() + functional.relu(1 + fake_logits).mean())
    else:
        d = 0.5 * (functional.softplus(-real_logits).mean() + functional.softplus(fake_logits).mean())
    (of_x,) = torch.autograd.grad(real_logits.mean((1, 2, 3)).sum(), real, create_graph=True)
    r1 = 0.5 * of_x.square().sum((1, 2, 3)).mean()
    weights = list(discriminator.parameters())
    found = torch.autograd.grad(d + r1_weight * r1, weights)
    by_weight = {id(weight): grad for weight, grad in zip(weights, found, strict=True)}
    scalars = {"nll": nll, "regularizer": regularizer, "g": g, "factor": factor, "total": total, "d": d, "r1": r1}
    return (
        {name: value.item() for name, value in scalars.items()},
        {name: to_jax(grad) for name, grad in zip(p, of_generator, strict=True)},
        discriminator.to_jax(lambda weight: by_weight[id(weight)]),
    )


def jax_step(model, case, generator, discriminator, x, noise):
    """The same from `losses`, with one pass through the autoencoder and one of each image through the discriminator."""
    is_vq, r1_weight = case["is_vq"], case["r1_weight"]

    def convolve(x, kernel, padding):
        layout = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=layout)

    def conv(name, x, p):
        return convolve(x, p[f"{name}.weight"], "SAME")

    def generate(p):
        latents = conv("latent", jax.nn.silu(conv("conv_in", x, p)), p)
        if is_vq:
            distances = jnp.square(latents[..., None, :] - p["codebook"]).sum(-1)
            codes = p["codebook"][distances.argmin(-1)]
            stop = jax.lax.stop_gradient
            codebook, commitment = jnp.square(stop(latents) - codes).mean(), jnp.square(latents - stop(codes)).mean()
            regularizer = CODEBOOK_WEIGHT * (BETA * codebook + commitment)
            z = latents + stop(codes - latents)
        else:
            mean, log_std = latents[..., :LATENTS], latents[..., LATENTS:] / 2
            regularizer, z = KL_WEIGHT * losses.kl_divergence(mean, log_std), mean + jnp.exp(log_std) * noise
        last_input = jax.nn.silu(conv("hidden", z, p))
        return (conv("conv_out", last_input, p), regularizer), last_input

    def nll_of(x_hat, logvar):
        kernel = FEATURES["kernel"].transpose(2, 3, 1, 0)
        maps = ([jnp.tanh(convolve(z, kernel, "VALID"))] for z in (x, x_hat))
        distance = lpips.feature_distance(*maps, [FEATURES["head"]])
        error = losses.reconstruction_error(x, x_hat, distance, PERCEPTUAL_WEIGHT)
        return losses.vq_nll(error) if is_vq else losses.kl_nll(error, logvar)

    def judge(p, x):
        return model.apply({"params": p}, x)

    (x_hat, regularizer), pull, last_input = jax.vjp(generate, generator, has_aux=True)
    logvar = generator.get("logvar", jnp.zeros(()))
    nll, (of_nll, of_logvar) = jax.value_and_grad(nll_of, (0, 1))(x_hat, logvar)
    fake, pull_fake = jax.vjp(judge, discriminator, x_hat)
    real, pull_real = jax.vjp(lambda p: judge(p, x), discriminator)
    g, of_fake = jax.value_and_grad(losses.generator_loss)(fake)
    of_g = pull_fake(of_fake)[1]
    last = {"conv_out.weight": generator["conv_out.weight"]}
    _, pull_last = jax.vjp(lambda last: conv("conv_out", last_input, last), last)
    factor = losses.adaptive_factor(*(pull_last(grad)[0]["conv_out.weight"] for grad in (of_nll, of_g)))
    (of_generator,) = pull((of_nll + DISC_WEIGHT * factor * of_g, jnp.ones(())))
    if not is_vq:
        of_generator["logvar"] += of_logvar

    loss_of = functools.partial(losses.discriminator_loss, kind=case["loss"])
    d, (of_real, of_fake) = jax.value_and_grad(loss_of, (0, 1))(real, fake)
    r1, of_r1 = jax.value_and_grad(lambda p: losses.r1_penalty(lambda x: judge(p, x), x))(discriminator)
    parts = pull_real(of_real)[0], pull_fake(of_fake)[0], of_r1
    of_discriminator = jax.tree.map(lambda real, fake, of_r1: real + fake + r1_weight * of_r1, *parts)
    total = nll + regularizer + DISC_WEIGHT * factor * g
    scalars = {"nll": nll, "regularizer": regularizer, "g": g, "factor": factor, "total": total, "d": d, "r1": r1}
    return scalars, of_generator, of_discriminator


CASES = {
    "KL, hinge": {"is_vq": False, "loss": "hinge", "norm": "batch", "r1_weight": 0},
    "VQ, vanilla, R1": {"is_vq": True, "loss": "vanilla", "norm": "batch", "r1_weight": 3},
    "KL, vanilla, R1": {"is_vq": False, "loss": "vanilla", "norm": "group", "r1_weight": 3},
    "VQ, hinge": {"is_vq": True, "loss": "hinge", "norm": "group", "r1_weight": 0},
}


@pytest.mark.parametrize("name", CASES)
def test_step(name):
    case = CASES[name]
    model = PatchDiscriminator(width=8, norm=case["norm"])
    reference = TorchDiscriminator(8, 3, case["norm"]).double().train()
    rng = np.random.default_rng(3)
    with torch.no_grad():
        for parameter_name, p in reference.named_parameters():
            p.copy_(torch.tensor(random_tensor(parameter_name, tuple(p.shape), rng).astype(np.float32)))
    tensors = generator_tensors(case["is_vq"])
    expected = torch_step(tensors, reference, case)

    generator = {name: to_jax(torch.tensor(x)) for name, x in tensors.items()}
    x, noise = (to_nhwc(z) for z in inputs())
    step = jax.jit(functools.partial(jax_step, model, case))
    scalars, *gradients = step(generator, reference.to_jax(), x, noise)
    errors = {name: abs(scalars[name] / value - 1) for name, value in expected[0].items()}
    for actual, desired in zip(gradients, expected[1:], strict=True):
        found = jax.tree.map(relative_error, actual, desired)
        errors |= {path_of(path): error for path, error in jax.tree_util.tree_leaves_with_path(found)}
    assert max(errors.values()) < TOLERANCE, errors


def test_lpips():
    """Values, and the gradient by the second image."""
    tensors = random_tensors(lpips.tensor_shapes())
    tensors = {name: np.abs(x) if name.startswith("lin") else x for name, x in tensors.items()}
    x = torch.tanh(torch.tensor(normal(0, 4, 3, SIZE, SIZE))).double()
    y = (x + 0.1 * torch.tensor(normal(4, *x.shape))).float().double().requires_grad_()
    expected = TorchLPIPS(tensors)(x, y)
    (of_y,) = torch.autograd.grad(expected.sum(), y)

    def total(y, params, x):
        distances = lpips.LPIPS().apply({"params": params}, x, y)
        return distances.sum(), distances

    both = jax.jit(jax.value_and_grad(total, has_aux=True))
    (_, distances), gradient = both(to_nhwc(y), lpips.params_of(tensors), to_nhwc(x))
    assert relative_error(distances, expected.detach().numpy()) < TOLERANCE
    errors = sorted(map(relative_error, gradient, to_nhwc(of_y)))
    assert errors[-2] < TOLERANCE and errors[-1] < 1e-2, errors


def to_nhwc(x):
    return np.float32(x.detach().numpy().transpose(0, 2, 3, 1))
