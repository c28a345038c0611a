"""The program `diffussm_jax.evaluate`: runs, files and folders in, reports out; wrong inputs are refused.

The scores' values are tested in tests/evaluation. The classifier is a stand-in here: means of the image's quarters.
"""

import csv
import json
import os
import shutil
import socket
import subprocess
import sys
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from programs import run_program

from diffussm_jax import evaluate, evaluate_images, evaluate_real, load_run
from diffussm_jax.evaluate_sweep import combinations, parse_sweeps
from diffussm_jax.evaluation.extractor import FEATURES, PROBABILITIES, Extractor
from diffussm_jax.evaluation.frechet import Moments, frechet_distance

FILES = ("--batch_size=8", "--bootstrap=5", "--features=digits")
QUICK = ("--num_samples=20", *FILES)


def quarters(params, images):
    x = images.astype(jnp.float32) / 255
    features = x.reshape(len(x), 2, x.shape[1] // 2, 2, x.shape[2] // 2).mean((2, 4)).reshape(len(x), 4)
    return {FEATURES: features, PROBABILITIES: jnp.exp(features) / jnp.exp(features).sum(1, keepdims=True)}


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    extractor = Extractor("digits", quarters, {}, "a" * 64, 1, "FD-digits", 8)
    monkeypatch.setattr(evaluate_real, "classifier_extractor", lambda *arguments: extractor)


def run(*arguments, code=0):
    found, printed = run_program(evaluate.main, *arguments, flag_values=evaluate._FLAGS, num_arguments=None)
    assert found == code, printed
    return printed


@pytest.fixture(scope="module")
def evaluated(tiny_run, tmp_path_factory):
    """The folder of a report, made with a stand-in for the classifier."""
    out = tmp_path_factory.mktemp("evaluated")
    patch = pytest.MonkeyPatch()
    extractor = Extractor("digits", quarters, {}, "a" * 64, 1, "FD-digits", 8)
    patch.setattr(evaluate_real, "classifier_extractor", lambda *arguments: extractor)
    run(f"--workdir={tiny_run}", f"--out={out}", *QUICK)
    patch.undo()
    return out


def report_of(folder):
    return json.loads((folder / "report.json").read_text())


def test_a_run_is_scored_with_its_protocol(evaluated, tiny_run):
    report = report_of(evaluated)
    images, _ = load_run(tiny_run).sample(20, batch_size=8)
    real = evaluate_real.open_real_data("digits").training_arrays[0]
    real = real[np.isin(np.arange(len(real)), np.random.default_rng(0).permutation(len(real))[: len(real) // 2])]
    expected = frechet_distance(*(np.asarray(quarters({}, x)[FEATURES]) for x in (images, real)))
    assert report["scores"]["FD-digits"]["value"] == pytest.approx(expected, rel=1e-5)
    protocol = report["protocol"]
    known = {"num_samples": 20, "labels": "balanced", "seed": 0, "step": 12, "features": "digits", "evaluations": 3}
    assert known.items() <= protocol.items()
    assert {"sampler": "ddim", "num_steps": 3, "guidance_scale": 1.5}.items() <= protocol["sampling"].items()
    assert protocol["reference"]["num_images"] == len(real) and len(protocol["checkpoint_sha256"]) == 64
    assert [row["name"] for row in report["equal_sizes"]] == ["samples", "noise", "real"]
    assert report["equal_sizes"][1]["mean"] > report["equal_sizes"][2]["mean"]
    assert set(report["neighbours"]["copy_tests"]) == {"features", "pixels"}
    page = (evaluated / "report.html").read_text()
    assert page.count("data:image/png") == 2 and "detect little" in page
    assert "FD-digits" in (evaluated / "report.txt").read_text()


def test_samples_are_kept_and_drawn_only_once(evaluated, tiny_run, tmp_path, monkeypatch):
    out = shutil.copytree(evaluated, tmp_path / "out")
    files = sorted(file.name for file in (out / "samples").iterdir())
    assert files == ["about.json", *(f"batch_{i:06d}.npz" for i in range(3))]
    images, labels = load_run(tiny_run).sample(20, batch_size=8)
    kept = [np.load(out / "samples" / file) for file in files[1:]]
    np.testing.assert_array_equal(np.concatenate([file["arr_0"] for file in kept]), images)
    np.testing.assert_array_equal(np.concatenate([file["arr_1"] for file in kept]), labels)
    (out / "samples" / files[2]).unlink()
    drawn = []
    draw = evaluate_images.Run.sample_batch
    monkeypatch.setattr(
        evaluate_images.Run, "sample_batch", lambda self, labels, i, **o: drawn.append(i) or draw(self, labels, i, **o)
    )
    run(f"--workdir={tiny_run}", f"--out={out}", *QUICK)
    assert drawn == [1] and report_of(out) == report_of(evaluated)
    printed = run(f"--workdir={tiny_run}", f"--out={out}", *QUICK, "--seed=1", code=1)
    assert "another protocol" in printed and "'seed': (0, 1)" in printed


def test_a_file_in_the_convention_of_adm_gives_the_same_scores(evaluated, tiny_run, tmp_path):
    images, labels = load_run(tiny_run).sample(20, batch_size=8)
    np.savez(tmp_path / "samples.npz", images, labels)
    printed = run(f"--samples={tmp_path}/samples.npz", *FILES)
    report = report_of(tmp_path / "samples_digits")
    assert report["scores"] == report_of(evaluated)["scores"]
    assert report["protocol"]["samples"] == "samples.npz" and len(report["protocol"]["samples_sha256"]) == 64
    assert "samples_digits/report.html" in printed


def test_a_folder_of_images_gives_the_same_scores(evaluated, tiny_run, tmp_path):
    """Without labels, or with those of its folders."""
    images, labels = load_run(tiny_run).sample(20, batch_size=8)
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        for folder in (tmp_path / "flat", tmp_path / "classes" / str(label)):
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[..., 0]).save(folder / f"{i:02d}.png")
    expected = report_of(evaluated)["scores"]
    for name, missing in (("flat", {"accuracy-digits", "diversity-digits"}), ("classes", set())):
        run(f"--samples={tmp_path}/{name}", *FILES)
        scores = report_of(tmp_path / f"{name}_digits")["scores"]
        assert expected.keys() - scores.keys() == missing
        assert scores["FD-digits"]["value"] == pytest.approx(expected["FD-digits"]["value"], rel=1e-5)
    Image.fromarray(images[0, ..., 0]).resize((9, 9)).save(tmp_path / "flat" / "20.png")
    assert "20.png is of shape (9, 9, 3)" in run(f"--samples={tmp_path}/flat", *FILES, code=1)
    Image.new("RGB", (8, 8), "red").save(tmp_path / "flat" / "20.png")
    assert "takes grayscale images" in run(f"--samples={tmp_path}/flat", *FILES, code=1)


def test_kept_samples_are_scored_again_with_their_protocol(evaluated, tmp_path):
    run(f"--samples={evaluated}/samples", f"--out={tmp_path}", *FILES)
    assert report_of(tmp_path) == report_of(evaluated)


def test_a_reference_file_gives_the_same_scores(evaluated, tiny_run, tmp_path):
    path = tmp_path / "reference.npz"
    run(f"--make_reference={path}", "--data=digits", "--features=digits")
    with np.load(path) as file:
        assert {"arr_0", "arr_1", "mu", "sigma", "about"} == set(file.files)
        expected = Moments.of(np.asarray(quarters({}, file["arr_0"])[FEATURES]))
        np.testing.assert_allclose(file["mu"], expected.mean, rtol=1e-6)
        np.testing.assert_allclose(file["sigma"], expected.covariance, rtol=1e-6)
    run(f"--workdir={tiny_run}", f"--reference={path}", f"--out={tmp_path}/out", *QUICK)
    report, expected = report_of(tmp_path / "out"), report_of(evaluated)
    for name, score in report["scores"].items():
        assert score["value"] == pytest.approx(expected["scores"][name]["value"], rel=1e-6), name
    assert len(report["protocol"]["reference"]["file_sha256"]) == 64


def test_labels_are_balanced_or_random():
    assert np.bincount(evaluate_images.draw_labels("balanced", 25, 10, 0)).tolist() == [3] * 5 + [2] * 5
    drawn = evaluate_images.draw_labels("random", 1000, 10, 0)
    assert np.bincount(drawn).min() < 95 < 105 < np.bincount(drawn).max()
    np.testing.assert_array_equal(drawn, evaluate_images.draw_labels("random", 1000, 10, 0))
    assert not evaluate_images.draw_labels("random", 5, 0, 0).any()


@pytest.mark.slow
def test_two_processes_give_the_scores_of_one(tiny_run, tmp_path):
    """Each with two devices; features within float32's rounding. The classifier is the real one."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    flags = [f"--workdir={tiny_run}", "--num_samples=40", "--batch_size=16", "--bootstrap=5", "--features=digits"]
    xla_flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    environment = os.environ | {"XLA_FLAGS": xla_flags, "XDG_CACHE_HOME": str(tmp_path)}

    def start(*more):
        return subprocess.Popen([sys.executable, "-m", "diffussm_jax.evaluate", *flags, *more], env=environment)

    together = [start(f"--out={tmp_path}/two", f"--distributed={address},2,{i}") for i in range(2)]
    assert [process.wait(timeout=400) for process in together] == [0, 0]
    assert start(f"--out={tmp_path}/one").wait(timeout=400) == 0
    one, two = report_of(tmp_path / "one"), report_of(tmp_path / "two")
    assert two["protocol"]["device"] == "4 x cpu" and one["protocol"]["device"] == "2 x cpu"
    for name, score in one["scores"].items():
        assert two["scores"][name]["value"] == pytest.approx(score["value"], rel=1e-3, abs=1e-4), name


# Sweeps and comparisons


@pytest.mark.slow
def test_a_sweep_names_the_best_and_draws_it(tiny_run, tmp_path):
    printed = run(
        f"--workdir={tiny_run}", f"--out={tmp_path}", *QUICK, "--sweep=steps:3,1", "--sweep=guidance_scale:1.5"
    )
    with open(tmp_path / "sweep.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["num_steps"], row["guidance_scale"]) for row in rows] == [("3", "1.5"), ("1", "1.5")]
    assert [row["evaluations"] for row in rows] == ["3", "1"]
    best = min(rows, key=lambda row: float(row["FD-digits"]))
    assert f"The best: num_steps {best['num_steps']}, guidance_scale 1.5, FD-digits" in printed
    assert float(best["FD-digits_low"]) <= float(best["FD-digits"]) <= float(best["FD-digits_high"])
    assert Image.open(tmp_path / "sweep.png").size == (840, 540)
    assert "num_samples=20" in rows[0]["protocol"]


def test_every_combination_of_a_sweep_is_made():
    sweeps = parse_sweeps(["steps:10, 20", "guidance_interval:(0,0.5),(0.2,1)", "sampler:ddim"])
    assert sweeps == {"num_steps": [10, 20], "guidance_interval": [(0, 0.5), (0.2, 1)], "sampler": ["ddim"]}
    assert len(combinations(sweeps)) == 4
    assert combinations(sweeps)[1] == {"num_steps": 10, "guidance_interval": (0.2, 1), "sampler": "ddim"}


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("steps", "KEY:VALUE"),
        ("steps:", "KEY:VALUE"),
        ("stepz:1", "sampling.stepz"),
        ("num_steps:0", "num_steps.*0"),
        ("sampler:euler2", "euler2"),
        ("guidance_scale:big", "guidance_scale.*big"),
        ("guidance_interval:(0.5,0.1)", r"guidance_interval|interval must be"),
    ],
)
def test_wrong_sweeps_are_named(tiny_run, tmp_path, flag, message):
    import re

    printed = run(f"--workdir={tiny_run}", f"--out={tmp_path}", *QUICK, f"--sweep={flag}", code=1)
    assert re.search(message, printed), printed
    assert not list(tmp_path.iterdir())


def test_two_reports_are_compared(evaluated, tmp_path):
    other = report_of(evaluated)
    other["scores"]["FD-digits"]["value"] += 100
    (tmp_path / "report.json").write_text(json.dumps(other))
    other["protocol"]["step"] = 99
    (tmp_path / "report.json").write_text(json.dumps(other))
    printed = run("--compare", evaluated, tmp_path)
    assert "also differ in\n  step: 12 (A), 99 (B)" in printed
    line = next(line for line in printed.splitlines() if line.startswith("FD-digits"))
    assert "differs" in line and "100.0" in line
    assert printed.count("within the noise") == len(other["scores"]) - 1
    assert "between the reports" in run("--compare", f"{evaluated},{tmp_path}", f"{tmp_path},{evaluated}")
    assert "there is no report" in run("--compare", evaluated, tmp_path / "none", code=1)
    assert "two reports" in run("--compare", evaluated, code=1)


# Wrong inputs


def file_of(tmp_path, **arrays):
    np.savez(tmp_path / "x.npz", **arrays)
    return tmp_path / "x.npz"


IMAGES = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 1), np.uint8)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (IMAGES / np.float32(255), "uint8 from 0 to 255, got float32"),
        (IMAGES // 255, "0 ... 1"),
        (IMAGES.transpose(0, 3, 1, 2), "channels last"),
        (np.random.default_rng(1).integers(0, 256, (12, 8, 8, 3), np.uint8), "grayscale images"),
        (IMAGES[:0], "[N, H, W, C]"),
        (IMAGES[0], "[N, H, W, C]"),
        (np.array([{"a": 1}]), "pickled"),
    ],
    ids=["float", "0...1", "NCHW", "colour", "none", "one", "pickled"],
)
def test_images_that_cannot_be_scored_are_refused(tmp_path, images, message):
    path = file_of(tmp_path, arr_0=images)
    assert message in run(f"--samples={path}", f"--out={tmp_path}/out", *FILES, code=1)
    assert not (tmp_path / "out" / "report.json").exists()


def test_damaged_files_are_named(tmp_path):
    path = file_of(tmp_path, arr_0=IMAGES, arr_1=np.arange(3))
    assert "arr_1 must be the 12 labels" in run(f"--samples={path}", *FILES, code=1)
    (tmp_path / "x.npz").write_bytes(path.read_bytes()[:200])
    assert "x.npz is no .npz file, or a damaged one" in run(f"--samples={path}", *FILES, code=1)
    assert "x.npz has no arr_0, only ['images']" in run(f"--samples={file_of(tmp_path, images=IMAGES)}", *FILES, code=1)
    with zipfile.ZipFile(path, "w") as archive, archive.open("arr_0.npy", "w") as member:
        np.lib.format.write_array_header_1_0(member, {"shape": (9, 8, 8, 1), "fortran_order": False, "descr": "|u1"})
        member.write(bytes(64))
    assert "is cut" in run(f"--samples={path}", *FILES, code=1)


def test_references_that_do_not_fit_are_refused(tmp_path):
    samples = file_of(tmp_path, arr_0=IMAGES)
    flags = (f"--samples={samples}", f"--out={tmp_path}/out", *FILES)

    def refused(**arrays):
        np.savez(tmp_path / "r.npz", **arrays)
        return run(*flags, f"--reference={tmp_path}/r.npz", code=1)

    assert "needs mu and sigma, or images arr_0; it has ['x']" in refused(x=np.zeros(3))
    assert "d = 5" in refused(mu=np.zeros(5), sigma=np.eye(5))
    about = json.dumps({"extractor": "inception"})
    assert "made with the extractor 'inception'" in refused(mu=np.zeros(4), sigma=np.eye(4), about=np.array(about))
    assert "grayscale" in refused(arr_0=np.repeat(IMAGES, 3, -1))
    assert "pickled objects" in refused(arr_0=np.array([{"a": 1}]))
    assert "r.npz" in run(*flags, f"--reference={tmp_path}/gone/r.npz", code=1)


def test_fewer_samples_than_dimensions_are_warned_of(tmp_path):
    path = file_of(tmp_path, arr_0=IMAGES[:4])
    printed = run(f"--samples={path}", f"--out={tmp_path}/out", *FILES, "--scores=frechet")
    assert "WARNING: 4 samples for features of 4 dimensions" in printed
    assert "4 samples for features" in (tmp_path / "out" / "report.html").read_text()


def test_wrong_flags_are_named(tiny_run, tmp_path):
    assert "give --workdir=FOLDER" in run(code=1)
    assert "give --workdir=FOLDER" in run(f"--workdir={tiny_run}", "--samples=x.npz", code=1)
    assert "holds no run" in run(f"--workdir={tmp_path}", "--features=digits", code=1)
    assert "inception" in run(f"--workdir={tiny_run}", "--features=inception", f"--weights={tmp_path}/none", code=1)
    assert "arguments without --compare: a" in run("a", code=1)
    assert "ends in .npz" in run("--make_reference=x", "--data=digits", code=1)
    wrong = (f"--samples={file_of(tmp_path, arr_0=IMAGES)}", *QUICK, "--sampler=ddim")
    assert "--num_samples, --sampler would have no effect" in run(*wrong, code=1)
    assert "--sweep_score would" in run(f"--workdir={tiny_run}", *QUICK, "--sweep_score=x", code=1)
    assert "--split would" in run(f"--workdir={tiny_run}", *QUICK, "--split=x", code=1)
    assert "--out would" in run("--make_reference=x.npz", "--data=digits", "--out=x", code=1)
    sweep = (f"--workdir={tiny_run}", f"--out={tmp_path}/o", *QUICK, "--sweep=steps:1")
    assert "score of --sweep_score 'recal'" in run(*sweep, "--sweep_score=recal", code=1)
    assert "image_size=PIXELS" in run(f"--make_reference={tmp_path}/x.npz", f"--data={tmp_path}", code=1)
    assert "score 'fid'" in run(f"--workdir={tiny_run}", f"--out={tmp_path}/o", *QUICK, "--scores=fid", code=1)
    assert "--data=PATH" in run(f"--samples={file_of(tmp_path, arr_0=IMAGES)}", "--features=cifar10", code=1)
