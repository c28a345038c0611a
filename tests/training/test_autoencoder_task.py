"""The autoencoder's task: its gradients against plain autodiff, exact resume, what is skipped, frozen and refused."""

import csv
import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from programs import run_program
from runs import QUIET, run
from tiny import tiny_autoencoder_config

from diffussm_jax import export
from diffussm_jax.autoencoder import from_diffusers, to_diffusers
from diffussm_jax.build import Parts
from diffussm_jax.config import choose, override
from diffussm_jax.experiment import build_experiment
from diffussm_jax.training.adversary import adversarial_warnings
from diffussm_jax.training.autoencoder_task import DISCRIMINATOR, GENERATOR, LOGVAR
from diffussm_jax.training.loop import train
from diffussm_jax.validation import validate

KINDS = {
    "kl": ("kl", {"task.autoencoder.learns_logvar": True, "task.autoencoder.kl_weight": 1e-3}),
    "vq": ("vq", {"task.autoencoder.codebook_decay": 0.0, "task.disc_norm": "batch"}),
    "vq, commitment, vanilla": (
        "vq",
        {
            "task.autoencoder.codebook_decay": 0.0,
            "task.autoencoder.beta_term": "commitment",
            "task.disc_loss": "vanilla",
            "task.r1_weight": 0.1,
        },
    ),
}


def make_task(kind="kl", **changes):
    return Parts(override(tiny_autoencoder_config(kind), changes)).task


@pytest.fixture(scope="module")
def vq_task():
    return make_task("vq")


def some_batch(task, seed=0):
    rng, spec = np.random.default_rng(seed), task.batch_spec
    image = rng.integers(0, 256, spec["image"].shape, dtype=np.uint8)
    return {"image": image, "label": np.zeros(spec["label"].shape, np.int32)}


def plain_losses(task, config, params, images, noise, ramp, factor):
    """The autoencoder's and the discriminator's loss from their formulas, and nll and g alone."""
    autoencoder, model, o = config.task.autoencoder, task.stage.model, config.task
    generator, discriminator = params[GENERATOR], params[DISCRIMINATOR]
    B = len(images)
    if autoencoder.name == "kl":
        mean, log_std = model.apply({"params": generator}, images, method="encode")
        x_hat = model.apply({"params": generator}, mean + jnp.exp(log_std) * noise, method="decode")
        error, logvar = jnp.abs(images - x_hat), params[LOGVAR]
        nll = jnp.sum(error / jnp.exp(logvar) + logvar) / B
        regularizer = autoencoder.kl_weight * jnp.sum(mean**2 + jnp.exp(2 * log_std) - 1 - 2 * log_std) / (2 * B)
    else:
        z, _ = model.apply({"params": generator}, images, method="encode")
        codebook = generator["quantize"]["embedding"]
        distances = jnp.sum((z[..., None, :] - codebook) ** 2, -1)
        z_q = codebook[jnp.argmin(distances, -1)]
        x_hat = model.apply({"params": generator}, z + jax.lax.stop_gradient(z_q - z), method="decode_quantized")
        nll = jnp.abs(images - x_hat).mean()
        of_codebook = ((jax.lax.stop_gradient(z) - z_q) ** 2).mean()
        of_commitment = ((z - jax.lax.stop_gradient(z_q)) ** 2).mean()
        weights = (1, 0.25) if autoencoder.beta_term == "commitment" else (0.25, 1)
        regularizer = weights[0] * of_codebook + weights[1] * of_commitment

    def judge(x):
        return task.adversary.model.apply({"params": discriminator}, x)

    g = -judge(x_hat).mean()
    real, fake = judge(images), judge(jax.lax.stop_gradient(x_hat))
    if o.disc_loss == "hinge":
        d_loss = 0.5 * (jnp.maximum(0, 1 - real).mean() + jnp.maximum(0, 1 + fake).mean())
    else:
        d_loss = 0.5 * (jnp.log1p(jnp.exp(-real)).mean() + jnp.log1p(jnp.exp(fake)).mean())
    if o.r1_weight:
        of_x = jax.grad(lambda x: judge(x).mean((1, 2, 3)).sum())(images)
        d_loss += o.r1_weight * 0.5 * jnp.sum(of_x**2) / B
    return nll + regularizer + ramp * 0.5 * factor * g, d_loss, nll, g


@pytest.mark.parametrize("case", ["kl", pytest.param("vq", marks=pytest.mark.slow), "vq, commitment, vanilla"])
def test_gradients_are_those_of_the_formulas(case):
    kind, changes = KINDS[case]
    config = override(tiny_autoencoder_config(kind), changes)
    task = Parts(config).task
    params = jax.jit(task.init_params)()
    if kind == "vq":  # codes that are apart, so that no rounding decides which is the nearest
        params[GENERATOR]["quantize"]["embedding"] = jax.random.normal(jax.random.key(1), (16, 2))
    if LOGVAR in params:
        params[LOGVAR] = jnp.float32(0.3)
    batch, key, step = some_batch(task), jax.random.key(2), jnp.int32(4)  # half of the ramp
    drawn = task._draw(batch, key)
    (grads, found), _ = jax.jit(task._gradients)(params, drawn, step, {})

    losses = functools.partial(plain_losses, task, config, images=drawn.images, noise=drawn.noise, ramp=0.5)

    @jax.jit
    def expected(params):
        of_last = [
            jax.grad(lambda p, i=i: losses(p, factor=0.0)[i])(params)[GENERATOR]["decoder"]["conv_out"]["kernel"]
            for i in (2, 3)
        ]
        factor = jnp.linalg.norm(of_last[0]) / (jnp.linalg.norm(of_last[1]) + 1e-4)
        of_generator = jax.grad(lambda p: losses(p, factor=factor)[0])(params)
        of_discriminator = jax.grad(lambda p: losses(p, factor=factor)[1])(params)
        grads = of_generator | {DISCRIMINATOR: of_discriminator[DISCRIMINATOR]}
        return grads, factor, losses(params, factor=factor)

    of_plain, factor, (loss, d_loss, nll, g) = expected(params)
    np.testing.assert_allclose(found["adaptive_factor"], factor, rtol=1e-5)
    np.testing.assert_allclose(
        [found[name] for name in ("loss", "d_loss", "nll", "g_loss")],
        [loss, d_loss - (0.1 * found["r1"] if "r1" in found else 0), nll, g],
        rtol=1e-5,
    )
    norms = {part: np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(of_plain[part]))) for part in of_plain}
    for part, norm in norms.items():
        for a, b in zip(jax.tree.leaves(grads[part]), jax.tree.leaves(of_plain[part]), strict=True):
            assert np.linalg.norm(a - b) < 1e-5 * norm


def test_the_discriminator_is_trained_from_its_warmup_on_and_seen_from_its_start_on(vq_task):
    task = vq_task
    state, batch = task.create_state(), some_batch(task)
    before = jax.device_get(state.params)

    def is_changed(part):
        now = jax.device_get(state.params[part])
        return any((a != b).any() for a, b in zip(jax.tree.leaves(before[part]), jax.tree.leaves(now), strict=True))

    for step in range(7):
        assert is_changed(DISCRIMINATOR) == (step > 2) and is_changed(GENERATOR) == (step > 0)
        state, metrics = task.train_step(state, batch)
        seen = {4: 0.5, 5: 1.0, 6: 1.0}.get(step, 0)
        np.testing.assert_allclose(metrics["adversarial_weight"], 0.5 * seen * metrics["adaptive_factor"], rtol=1e-6)
        assert (metrics["d_loss"] > 0) == (step >= 2)


def test_a_step_that_is_not_finite_changes_nothing_but_the_counters(vq_task):
    task = vq_task
    state = task.create_state()
    state = state.replace(step=jnp.int32(5))
    state.params[DISCRIMINATOR]["conv_0"]["bias"] += jnp.nan
    before = jax.device_get(state)
    state, metrics = task.train_step(state, some_batch(task))
    assert metrics["skipped"] == 1 and not np.isfinite(metrics["loss"])
    after = jax.device_get(state)
    assert (after.step, after.skipped_in_a_row) == (6, 1)
    jax.tree.map(
        np.testing.assert_array_equal,
        before.replace(step=0, skipped_in_a_row=0),
        after.replace(step=0, skipped_in_a_row=0),
    )


def test_leaving_the_discriminator_out_changes_no_value():
    """Where a step has no use for it, as on GPUs."""
    task = make_task(**{"task.disc_norm": "batch"})
    conditional = dataclasses.replace(task, adversary=dataclasses.replace(task.adversary, is_conditional=True))
    params, drawn = jax.jit(task.init_params)(), task._draw(some_batch(task), jax.random.key(0))
    of_step = [jax.jit(lambda params, step, t=t: t._gradients(params, drawn, step, {})[0]) for t in (task, conditional)]
    for step in (0, 5):
        expected, found = (jax.device_get(gradients(params, jnp.int32(step))) for gradients in of_step)
        assert (expected[1]["d_loss"] > 0) == (step == 5)
        for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
            assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(a) + 1e-6


@pytest.mark.slow
def test_microbatches_change_no_value():
    task = make_task("vq", **{"task.disc_weight": 0.0})
    found = []
    for t in (task, dataclasses.replace(task, accumulation_steps=2)):
        state, metrics = t.train_step(t.create_state(), some_batch(t))
        found.append(jax.device_get((state.codebook, {k: metrics[k] for k in ("loss", "nll", "l1", "grad_norm")})))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), *found)


def rows(workdir):
    timed = ("images_per_second", "step_ms", "compute_ms", "data_wait", "peak_memory_gb", "mfu")
    with open(workdir / "metrics.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k not in timed} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of 12 steps, the same run stopped after 5 and resumed, and its config."""
    config = tiny_autoencoder_config("vq")
    experiment, folder = build_experiment(config), tmp_path_factory.mktemp("autoencoder")
    assert train(experiment, folder / "whole") is None
    assert train(dataclasses.replace(experiment, num_steps=5), folder / "parts") is None
    assert train(experiment, folder / "parts") is None
    return folder / "whole", folder / "parts", config


def test_a_run_resumes_exactly(whole):
    whole, parts, _ = whole
    found, expected = rows(parts), rows(whole)
    assert [row for row in found if int(row["step"]) > 6] == [row for row in expected if int(row["step"]) > 6]
    assert float(expected[-1]["usage"]) > 0 and float(expected[-1]["eval_psnr"]) > 5
    jax.tree.map(np.testing.assert_array_equal, from_diffusers(whole)[1], from_diffusers(parts)[1])


def test_a_run_leaves_an_autoencoder_and_a_report(whole):
    whole, _, _ = whole
    model, _ = from_diffusers(whole)
    report = json.loads((whole / "reconstruction.json").read_text())
    assert report["scores"].keys() == {"PSNR", "SSIM"}
    assert report["scaling_factor"] == model.scaling_factor > 0 and len(report["latent_mean"]) == 2
    assert "| PSNR (dB) |" in (whole / "reconstruction.md").read_text()
    written = json.loads((whole / "vae" / "config.json").read_text())
    assert written["_latents_std"] == report["latent_std"]
    with Image.open(whole / "samples" / "step_00000012_reconstructions.png") as picture:
        assert picture.width >= 512


@pytest.mark.slow
def test_an_older_checkpoint_is_exported(whole, tmp_path):
    arguments = (f"--workdir={whole[0]}", "--checkpoint=8", f"--out={tmp_path}")
    code, printed = run_program(export.main, *arguments, flag_values=export._FLAGS)
    assert code == 0, printed
    assert json.loads((tmp_path / "reconstruction.json").read_text())["step"] == 8
    assert from_diffusers(tmp_path)[0].num_vq_embeddings == 16


@pytest.mark.slow
def test_the_decoder_is_trained_alone_with_a_perceptual_distance(whole, tmp_path):
    whole, _, config = whole
    config = override(config, {"task.perceptual": "digits", "task.report_features": "digits"})
    changes = {"num_steps": 2, "init_from": str(whole), "task.trains_encoder": False, "optimizer.warmup_steps": 0}
    assert train(build_experiment(override(config, changes)), tmp_path) is None
    (_, before), (_, after) = from_diffusers(whole), from_diffusers(tmp_path)
    for part in before:
        pairs = zip(jax.tree.leaves(before[part]), jax.tree.leaves(after[part]), strict=True)
        assert all((a == b).all() for a, b in pairs) == (part in ("encoder", "quant_conv")), part
    scores = json.loads((tmp_path / "reconstruction.json").read_text())["scores"]
    assert scores.keys() == {"PSNR", "SSIM", "distance-digits", "rFD-digits"}


@pytest.fixture(scope="module")
def vq_folder(vq_task, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vq")
    to_diffusers(vq_task.stage.model, jax.jit(vq_task.init_params)()[GENERATOR], folder / "vae")
    return folder


@pytest.mark.parametrize(
    "kind,changes,message",
    [
        ("kl", {}, "VQModel, the config describes a AutoencoderKL"),
        ("vq", {"task.autoencoder.num_vq_embeddings": 8}, "num_vq_embeddings is 16 there, 8 here"),
        ("vq", {"task.autoencoder.block_out_channels": (8,)}, r"block_out_channels is \(4, 8\) there, \(8,\) here"),
    ],
)
def test_another_autoencoder_to_start_from_is_refused(kind, changes, message, vq_folder):
    config = override(tiny_autoencoder_config(kind), changes | {"init_from": str(vq_folder)})
    with pytest.raises(ValueError, match=message):
        Parts(config).task.read_initial(config.init_from)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"data.image_size": 15}, "image_size = 15 is not a multiple of f = 2"),
        ({"task.disc_layers": 3}, "num_layers = 3 leaves nothing of 16 pixels"),
        ({"task.disc_warmup": 5}, "disc_warmup = 5 must be at most config.task.disc_start = 4"),
        ({"task.perceptual": "lpips"}, "needs config.task.vgg_weights"),
        ({"task.trains_encoder": False}, "needs config.init_from"),
        (
            {"task.autoencoder.norm_num_groups": 3},
            r"norm_num_groups = 3 must divide each of block_out_channels = \(4, 8\)",
        ),
        ({"task.autoencoder.block_out_channels": ("a",)}, "block_out_channels must be"),
        (
            {"task.autoencoder.latent_channels": 0},
            "latent_channels must be a whole number|latent_channels must be from 1",
        ),
        ({"task.autoencoder.name": "gan"}, "choose one of kl, vq"),
        ({"mesh.tensor": 2}, "mesh.tensor must be 1"),
    ],
)
def test_values_that_do_not_fit_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        validate(override(tiny_autoencoder_config(), changes), 8)


def test_latents_are_refused():
    config = tiny_autoencoder_config()
    choose(config, "data.source", "latents")
    with pytest.raises(ValueError, match="needs images"):
        validate(config)


def test_what_is_wrong_with_the_adversarial_training_is_said():
    fine = {"adversarial_weight": 1.0, "adaptive_factor": 10.0, "accuracy_real": 0.7, "accuracy_fake": 0.8}
    assert (
        adversarial_warnings(fine)
        == adversarial_warnings({})
        == adversarial_warnings(fine | {"adversarial_weight": 0.0})
        == {}
    )
    assert "1e+04" in adversarial_warnings(fine | {"adaptive_factor": 1e4})["factor"]
    assert "has won" in adversarial_warnings(fine | {"accuracy_real": 1.0, "accuracy_fake": 0.995})["accuracy"]
    assert "blind" in adversarial_warnings(fine | {"accuracy_real": 0.0, "accuracy_fake": 0.01})["accuracy"]


def test_a_step_with_lpips_is_lowered_ahead_of_time_without_its_weights():
    """As `plan` does."""
    changes = {"task.perceptual": "lpips", "task.vgg_weights": "nowhere.pth", "task.lpips_weights": "nowhere.pth"}
    config = override(tiny_autoencoder_config(), changes | {"data.num_channels": 3})
    task = Parts(config, is_abstract=True).task
    lowered = task.train_step.lower(task.abstract_state, task.batch_spec)
    assert task.costs.multiply_adds["perceptual"] > task.costs.multiply_adds["encoder"]
    assert "tensor<3x3x512x512xf32>" in lowered.as_text()  # a kernel of VGG16, an argument of the program


@pytest.mark.slow
def test_eight_devices_train_as_one(tmp_path):
    """At a small learning rate: Adam's first steps, which are as large for small gradients, magnify rounding."""
    task = ("perceptual=none", "report_features=none", "disc_start=2", "disc_warmup=2", "disc_layers=1")
    flags = (
        *("--config=configs/digits_autoencoder.py", *QUIET, "--config.num_steps=12", "--config.batch_size=16"),
        *("--config.optimizer.learning_rate=1e-4", "--config.task.autoencoder.block_out_channels=(8,16)"),
        *(f"--config.task.{value}" for value in task),
    )
    expected = run(tmp_path / "one", *flags)
    found = run(tmp_path / "mesh", *flags, "--config.mesh.data=4", "--config.mesh.fsdp=2", num_devices=8)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
