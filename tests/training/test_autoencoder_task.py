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


@pytest.mark.parametrize("case", KINDS)
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


def test_the_discriminator_is_trained_from_its_warmup_on_and_seen_from_its_start_on():
    task = make_task()
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


def test_a_step_that_is_not_finite_changes_nothing_but_the_counters():
    task = make_task("vq")
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


def test_leaving_the_discriminator_out_and_microbatches_change_no_value():
    task = make_task(**{"task.autoencoder.kl_weight": 1.0})
    conditional = dataclasses.replace(task, adversary=dataclasses.replace(task.adversary, is_conditional=True))
    without = make_task(**{"task.disc_weight": 0.0})
    pairs = [(task, conditional), (without, dataclasses.replace(without, accumulation_steps=2))]
    for one, other in pairs:
        for step in (0, 5):
            found = []
            for t in (one, other):
                _, metrics = t.train_step(t.create_state().replace(step=jnp.int32(step)), some_batch(t))
                found.append(jax.device_get(metrics))
            assert found[0].keys() == found[1].keys() and found[0]["grad_norm"] > 0
            for name in found[0]:
                np.testing.assert_allclose(found[0][name], found[1][name], rtol=1e-5, atol=1e-7, err_msg=name)


def rows(workdir):
    timed = ("images_per_second", "step_ms", "compute_ms", "data_wait", "peak_memory_gb", "mfu")
    with open(workdir / "metrics.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k not in timed} for row in csv.DictReader(file)]


def test_a_run_resumes_exactly_and_leaves_an_autoencoder_and_a_report(tmp_path):
    def config(num_steps):
        changes = {"num_steps": num_steps, "task.perceptual": "digits", "task.report_features": "digits"}
        return override(tiny_autoencoder_config("vq"), changes)

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(build_experiment(config(12)), whole) is None
    for num_steps in (5, 12):
        assert train(build_experiment(config(num_steps)), parts) is None
    found, expected = rows(parts), rows(whole)
    assert [row for row in found if int(row["step"]) > 6] == [row for row in expected if int(row["step"]) > 6]
    assert float(expected[-1]["usage"]) > 0 and "eval_psnr" in expected[-1]
    (model, params), (_, again) = from_diffusers(whole), from_diffusers(parts)
    jax.tree.map(np.testing.assert_array_equal, params, again)
    report = json.loads((whole / "reconstruction.json").read_text())
    assert {"PSNR", "SSIM", "distance-digits", "rFD-digits"} <= report["scores"].keys()
    assert report["scaling_factor"] == model.scaling_factor > 0 and len(report["latent_mean"]) == 2
    written = json.loads((whole / "vae" / "config.json").read_text())
    assert written["_latents_std"] == report["latent_std"]
    with Image.open(whole / "samples" / "step_00000012_reconstructions.png") as picture:
        assert picture.width >= 512
    # Of the checkpoint before the last; then its decoder alone, from the end.
    code, _ = run_program(
        export.main, f"--workdir={whole}", "--checkpoint=8", f"--out={tmp_path / 'out'}", flag_values=export._FLAGS
    )
    assert code == 0 and json.loads((tmp_path / "out" / "reconstruction.json").read_text())["step"] == 8
    assert from_diffusers(tmp_path / "out")[0].num_vq_embeddings == 16
    tuned = override(config(2), {"init_from": str(whole), "task.trains_encoder": False, "optimizer.warmup_steps": 0})
    assert train(build_experiment(tuned), tmp_path / "tuned") is None
    _, after = from_diffusers(tmp_path / "tuned")
    for part in params:
        is_same = all(
            (a == b).all() for a, b in zip(jax.tree.leaves(params[part]), jax.tree.leaves(after[part]), strict=True)
        )
        assert is_same == (part in ("encoder", "quant_conv")), part


@pytest.mark.parametrize(
    "kind,changes,message",
    [
        ("kl", {}, "VQModel, the config describes a AutoencoderKL"),
        ("vq", {"task.autoencoder.num_vq_embeddings": 8}, "num_vq_embeddings is 16 there, 8 here"),
        ("vq", {"task.autoencoder.block_out_channels": (8,)}, r"block_out_channels is \(4, 8\) there, \(8,\) here"),
    ],
)
def test_another_autoencoder_to_start_from_is_refused(kind, changes, message, tmp_path):
    task = make_task("vq")
    to_diffusers(task.stage.model, jax.jit(task.init_params)()[GENERATOR], tmp_path / "vae")
    config = override(tiny_autoencoder_config(kind), changes | {"init_from": str(tmp_path)})
    with pytest.raises(ValueError, match=message):
        build_experiment(config).task.create_state()


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


@pytest.mark.slow
def test_eight_devices_train_as_one(tmp_path):
    flags = (
        *("--config=configs/digits_autoencoder.py", *QUIET, "--config.num_steps=20", "--config.batch_size=16"),
        *(
            "--config.task.autoencoder.block_out_channels=(8,16)",
            "--config.task.disc_start=5",
            "--config.task.disc_warmup=5",
        ),
        *("--config.task.perceptual=none", "--config.task.report_features=none"),
    )
    expected = run(tmp_path / "one", *flags)
    found = run(tmp_path / "mesh", *flags, "--config.mesh.data=4", "--config.mesh.fsdp=2", num_devices=8)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
