"""The U-Net agrees with PyTorch on converted random weights: `bench.torch_unet`, and diffusers' UNet2DModel.

Weights are random where a fresh U-Net has zeros, so that no two tensors can be swapped unseen.

| quantity, float32, relative in the Euclidean norm | tolerance | measured |
|---|---|---|
| output, diffusers' too | 1e-5 | 8e-7 |
| gradient of a parameter or of x_t | 1e-5 | 3e-6 |

The published networks themselves are counted on PyTorch's meta device: parameters, and multiply-adds by hooks.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import relative_error
from random_tensors import random_tensors
from unet_problems import Given

from diffussm_jax.io import path_of
from diffussm_jax.models import UNET_SIZES, UNet
from diffussm_jax.models.backbone import class_labels
from diffussm_jax.models.unet_convert import from_pytorch, is_unet, to_pytorch

torch = pytest.importorskip("torch", reason="parity with PyTorch needs PyTorch")

from diffussm_jax.bench.torch_unet import AttentionBlock, CrossAttention, TorchUNet

RTOL = 1e-5
SIZE, NUM_CLASSES, TOKEN_WIDTH = 8, 5, 6
SMALL = {"width": 16, "num_res_blocks": 1, "norm_num_groups": 4, "num_head_channels": 8}
ADM = {
    "updown, legacy order": {
        "channel_mult": (0.5, 1.5),
        "attention_resolutions": (4,),
        "use_scale_shift_norm": True,
        "resblock_updown": True,
        "qkv_order": "legacy",
    },
    "convolutions, new order": {
        "channel_mult": (1, 2),
        "attention_resolutions": (8,),
        "use_scale_shift_norm": False,
        "resblock_updown": False,
        "num_res_blocks": 2,
    },
}
LDM = {
    "channel_mult": (1, 2),
    "attention_resolutions": (),
    "use_scale_shift_norm": False,
    "transformer_depth": 2,
    "num_heads": 2,
    "num_head_channels": 0,
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Networks this small gain nothing from more threads, which would take the cores from other tests."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def randomized(network):
    """The network with random tensors, and its state dict."""
    tensors = random_tensors({name: tuple(tensor.shape) for name, tensor in network.state_dict().items()})
    network.load_state_dict({name: torch.tensor(tensor) for name, tensor in tensors.items()})
    return network.eval(), tensors


def inputs(num_channels=3, num_outputs=2):
    rng = np.random.default_rng(0)
    shapes = [(2, SIZE, SIZE, num_channels), (2, SIZE, SIZE, num_outputs * num_channels)]
    x_t, weights = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    return x_t, np.array([7, 930]), np.array([1, NUM_CLASSES - 1]), weights


def channels_first(x):
    return torch.from_numpy(x.transpose(0, 3, 1, 2).copy())


def channels_last(x):
    return x.detach().permute(0, 2, 3, 1).numpy()


def flat(tree):
    return {path_of(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def assert_same_bits(written, published):
    assert written.keys() == published.keys()
    for name, array in published.items():
        assert (written[name].dtype, written[name].tobytes()) == (array.dtype, array.tobytes()), name


@pytest.mark.parametrize(
    "name", ["updown, legacy order", pytest.param("convolutions, new order", marks=pytest.mark.slow)]
)
def test_values_gradients_and_bits_of_adm(name):
    options = ADM[name]
    network, tensors = randomized(TorchUNet(SIZE, 3, num_classes=NUM_CLASSES, **SMALL | options))
    model, params = UNet(**SMALL | options, conditioners=class_labels(NUM_CLASSES)), from_pytorch(tensors)
    assert_same_bits(to_pytorch(jax.tree.map(jnp.asarray, params)), tensors)
    x_t, t, y, weights = inputs()

    @jax.jit
    def run(params, x_t):
        out, pull_back = jax.vjp(lambda params, x_t: model.apply_params(params, x_t, t, y), params, x_t)
        return out, pull_back(weights)

    out, (by_params, by_x_t) = run(params, x_t)
    torch_x_t = channels_first(x_t).requires_grad_()
    expected = network(torch_x_t, torch.from_numpy(t), torch.from_numpy(y))
    expected.backward(channels_first(weights))
    assert relative_error(out, channels_last(expected)) <= RTOL
    assert relative_error(by_x_t, channels_last(torch_x_t.grad)) <= RTOL
    gradients = flat(from_pytorch({name: p.grad.numpy() for name, p in network.named_parameters()}))
    found = flat(by_params)
    assert found.keys() == gradients.keys()
    for path, expected in gradients.items():
        assert relative_error(found[path], expected) <= RTOL, path


def test_ldm_with_labels_as_tokens():
    network, tensors = randomized(TorchUNet(SIZE, 3, n_context=TOKEN_WIDTH, num_outputs=1, **SMALL | LDM))
    table = np.random.default_rng(1).normal(size=(NUM_CLASSES + 1, TOKEN_WIDTH)).astype(np.float32)
    checkpoint = {f"model.diffusion_model.{name}": tensor for name, tensor in tensors.items()}
    checkpoint["cond_stage_model.embedding.weight"] = table
    others = {"betas": np.ones(3), "first_stage_model.decoder.conv_in.weight": np.ones((4, 3, 3, 3))}
    params = from_pytorch(checkpoint | others)
    assert_same_bits(to_pytorch(params), checkpoint)
    labels = class_labels(NUM_CLASSES, token_width=TOKEN_WIDTH)
    model = UNet(**SMALL | LDM, conditioners=labels, num_outputs=1)
    x_t, t, y, _ = inputs(num_outputs=1)
    with torch.no_grad():
        context = torch.from_numpy(table[y][:, None])
        expected = network(channels_first(x_t), torch.from_numpy(t), context=context)
    out = jax.jit(model.apply_params)(params, x_t, t, {"label": y})
    assert relative_error(out, channels_last(expected)) <= RTOL


DIFFUSERS = {
    "default": {
        "block_out_channels": (8, 16),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "num_class_embeds": NUM_CLASSES,
    },
    "scale and shift, updown": {
        "block_out_channels": (8, 16, 16),
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"),
        "up_block_types": ("ResnetUpsampleBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "resnet_time_scale_shift": "scale_shift",
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "attn_norm_num_groups": 4,
    },
    "no attention": {
        "block_out_channels": (8, 16),
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
        "add_attention": False,
        "layers_per_block": 2,
    },
}


def options_of(config):
    """The options of our model for a config of diffusers."""
    channels, types = config["block_out_channels"], config["down_block_types"]
    return {
        "width": channels[0],
        "channel_mult": tuple(n / channels[0] for n in channels),
        "num_res_blocks": config.get("layers_per_block", 1),
        "attention_resolutions": tuple(SIZE >> i for i, name in enumerate(types) if "Attn" in name),
        "has_middle_attention": config.get("add_attention", True),
        "use_scale_shift_norm": config.get("resnet_time_scale_shift") == "scale_shift",
        "resblock_updown": config.get("downsample_type") == "resnet",
        "num_head_channels": 4,
        "norm_num_groups": 4,
    }


@pytest.mark.parametrize(
    "name", [name if name == "default" else pytest.param(name, marks=pytest.mark.slow) for name in DIFFUSERS]
)
def test_diffusers(name):
    config = DIFFUSERS[name]
    diffusers = pytest.importorskip("diffusers", reason="parity with diffusers needs diffusers")
    shared = {"layers_per_block": 1, "attention_head_dim": 4, "norm_num_groups": 4, "out_channels": 6}
    network, tensors = randomized(diffusers.UNet2DModel(SIZE, **shared | config))
    num_classes = config.get("num_class_embeds", 0)
    params = from_pytorch(tensors)
    assert_same_bits(to_pytorch(params, layout="diffusers"), tensors)
    model = UNet(**options_of(config), conditioners=class_labels(num_classes))
    x_t, t, y, _ = inputs()
    out = jax.jit(model.apply_params)(params, x_t, t, y if num_classes else None)
    with torch.no_grad():
        labels = torch.from_numpy(y) if num_classes else None
        expected = network(channels_first(x_t), torch.from_numpy(t), labels).sample
    assert relative_error(out, channels_last(expected)) <= RTOL


@pytest.mark.slow
def test_stable_diffusions_layout():
    diffusers = pytest.importorskip("diffusers", reason="parity with diffusers needs diffusers")
    options = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 2}
    network = diffusers.UNet2DConditionModel(
        SIZE,
        in_channels=5,
        out_channels=3,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=TOKEN_WIDTH,
        **options,
    )
    network, tensors = randomized(network)
    params = from_pytorch(tensors)
    assert_same_bits(to_pytorch(params, layout="diffusers"), tensors)
    given = {"text": ("tokens", (4, TOKEN_WIDTH)), "picture": ("channels", (SIZE, SIZE, 2))}
    conditioners = {key: functools.partial(Given, gives=gives, shape=shape) for key, (gives, shape) in given.items()}
    model = UNet(
        **SMALL | LDM | {"width": 8, "attention_resolutions": (SIZE,), "transformer_depth": 1},
        conditioners=conditioners,
        num_outputs=1,
    )
    x_t, t, _, _ = inputs()
    condition = {key: np.random.default_rng(2).normal(size=(2, *shape)) for key, (_, shape) in given.items()}
    condition = jax.tree.map(np.float32, condition)
    out = jax.jit(model.apply_params)(params, x_t, t, condition)
    with torch.no_grad():
        both = channels_first(np.concatenate([x_t, condition["picture"]], -1))
        expected = network(both, torch.from_numpy(t), torch.from_numpy(condition["text"])).sample
    assert relative_error(out, channels_last(expected)) <= RTOL


LEAST = ("time_embedding.linear_1.weight", "conv_in.weight", "conv_out.weight")  # for a layout to be recognised


def count_multiply_adds(network, *arguments, **conditions):
    """Multiply-adds of convolutions, linear layers and attention, by hooks, as the papers count them."""
    found = {"convolutions": 0, "linear layers": 0, "attention": 0}

    def weighted(kind, size):
        def hook(module, inputs, output):
            found[kind] += output.numel() * size(module)

        return hook

    def self_attention(module, inputs, output):
        found["attention"] += 2 * math.prod(output.shape[2:]) ** 2 * output.shape[1]

    def cross_attention(module, inputs, output):
        found["attention"] += 2 * inputs[0].shape[1] * inputs[1].shape[1] * inputs[0].shape[2]

    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Conv1d):
            module.register_forward_hook(weighted("convolutions", lambda module: module.weight[0].numel()))
        elif isinstance(module, torch.nn.Linear):
            module.register_forward_hook(weighted("linear layers", lambda module: module.in_features))
        elif isinstance(module, AttentionBlock | CrossAttention):
            is_self = isinstance(module, AttentionBlock)
            module.register_forward_hook(self_attention if is_self else cross_attention)
    network(*arguments, **conditions)
    return found


# Size of the image or latent, and the parameters in millions and the multiply-adds in G that are printed. LDM-4 without
# the attention of 4.5 G: 99.8 G. DiT's paper has 103.6 G for it.
PUBLISHED = {
    "ADM-64": (64, 296, None),
    "ADM-256": (256, 554, 1120),
    "ADM-512": (512, 559, 1983),
    "LDM-4": (64, 401, 104),
}


def assert_same_costs(model, network, shape, *arguments, **conditions):
    """The multiply-adds of a network by kind, if ours has as many."""
    with torch.no_grad():
        counted = count_multiply_adds(network, *arguments, **conditions)
    assert model.costs(shape).total == sum(counted.values())
    return counted


def test_multiply_adds_are_those_of_pytorch():
    x_t, t = torch.zeros(1, 3, SIZE, SIZE), torch.zeros(1, dtype=torch.int64)
    options = SMALL | ADM["updown, legacy order"]
    model, network = UNet(**options, conditioners={}), TorchUNet(SIZE, 3, **options)
    assert all(assert_same_costs(model, network, (SIZE, SIZE, 3), x_t, t).values())


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_multiply_adds_of_the_published_networks(name):
    size, millions, giga = PUBLISHED[name]
    is_ldm = name == "LDM-4"
    options = {"n_context": 512, "num_outputs": 1} if is_ldm else {"num_classes": 1000}
    labels = class_labels(1000, token_width=512 if is_ldm else 0)
    model = UNet(**UNET_SIZES[name], conditioners=labels, num_outputs=1 if is_ldm else 2)
    with torch.device("meta"):
        network = TorchUNet(size, 3, **UNET_SIZES[name], **options)
        t = torch.zeros(1, dtype=torch.int64)
        condition = {"context": torch.zeros(1, 1, 512)} if is_ldm else {"labels": t}
        counted = assert_same_costs(model, network, (size, size, 3), torch.zeros(1, 3, size, size), t, **condition)
    num_parameters, total = sum(p.numel() for p in network.parameters()), sum(counted.values()) / 1e9
    print(f"{name}: {num_parameters:,} parameters, multiply-adds {counted}, {total:.2f} G")
    found = model.count_parameters((size, size, 3))
    # guided-diffusion's table has no row for the null label, and LDM's is no part of its U-Net.
    found["label_embed"] -= 1001 * 512 if is_ldm else 4 * model.width
    assert sum(found.values()) == num_parameters
    assert round(num_parameters / 1e6) == millions
    assert giga is None or abs(total - giga) < 1


def test_a_state_dict_of_another_network_is_refused_with_the_differences():
    tensors = randomized(TorchUNet(SIZE, 3, num_classes=NUM_CLASSES, **SMALL | ADM["updown, legacy order"]))[1]
    assert is_unet(tensors) and not is_unet({"x_embedder.proj.weight"})
    with pytest.raises(ValueError, match="no known layout.*x_embedder"):
        from_pytorch({"x_embedder.proj.weight": np.zeros(3)})
    changed = dict(tensors)
    del changed["middle_block.0.emb_layers.1.bias"]
    changed["input_blocks.1.0.in_layers.2.weight"] = changed["input_blocks.1.0.in_layers.2.weight"][:4]
    changed["extra.weight"] = np.zeros(3)
    with pytest.raises(ValueError) as error:
        from_pytorch(changed)
    for part in (r"missing: ['middle_block.0.emb_layers.1.bias (48,)']", "unexpected: ['extra.weight (3,)']"):
        assert part in str(error.value)
    assert "input_blocks.1.0.in_layers.2.weight: (4, 8, 3, 3), not (8, 8, 3, 3)" in str(error.value)


def test_a_row_for_the_null_label_is_added_or_kept():
    tensors = randomized(TorchUNet(SIZE, 3, num_classes=NUM_CLASSES, **SMALL | ADM["updown, legacy order"]))[1]
    added = from_pytorch(tensors)["label_embed"]["table"]["embedding"]
    assert len(added) == NUM_CLASSES + 1 and not added[-1].any()
    params = from_pytorch(tensors, has_null_label=True)
    assert len(params["label_embed"]["table"]["embedding"]) == NUM_CLASSES
    assert_same_bits(to_pytorch(params, has_null_label=True), tensors)
    with pytest.raises(ValueError, match="null label is not zero"):
        to_pytorch(params)
    with pytest.raises(ValueError, match="unknown layout 'onnx'"):
        to_pytorch(params, layout="onnx")
    for path in (("down_0", "block_0", "other"), ("side_0", "block_0", "conv1"), ("text_embed", "table"), ("final",)):
        tree = functools.reduce(lambda inner, name: {name: inner}, path[::-1], {"kernel": np.zeros((2, 2))})
        with pytest.raises(ValueError, match=f"has no place for {'/'.join(path)}/kernel"):
            to_pytorch(params | tree, has_null_label=True)
    with pytest.raises(ValueError, match=r"missing: \['conv_in.bias"):
        from_pytorch({name: np.zeros((4, 4)) for name in LEAST})
