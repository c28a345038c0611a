"""PSNR and SSIM equal their formulas in float64; scores of reconstructions are means with standard errors."""

import json
import math
import warnings

import jax.numpy as jnp
import numpy as np
import pytest

from diffussm_jax.evaluation import reconstruction
from diffussm_jax.evaluation.extractor import Extractor
from diffussm_jax.evaluation.frechet import FewSamplesWarning, frechet_distance
from diffussm_jax.evaluation.reconstruction import as_json, markdown_table, psnr, reconstruction_scores, ssim


def ssim_of_windows(x, y):
    """One image in float64: every window on its own, from its deviations."""
    g = np.exp(-((np.arange(11) - 5.0) ** 2) / 4.5)
    w = np.outer(g, g)[..., None] / np.outer(g, g).sum()
    H, W, _ = x.shape
    found = []
    for i in range(H - 10):
        for j in range(W - 10):
            a, b = (image[i : i + 11, j : j + 11].astype(np.float64) for image in (x, y))
            mean_a, mean_b = (w * a).sum((0, 1)), (w * b).sum((0, 1))
            var_a, var_b = (w * (a - mean_a) ** 2).sum((0, 1)), (w * (b - mean_b) ** 2).sum((0, 1))
            cov = (w * (a - mean_a) * (b - mean_b)).sum((0, 1))
            c_1, c_2 = 2.55**2, 7.65**2
            found.append(
                (2 * mean_a * mean_b + c_1) * (2 * cov + c_2) / ((mean_a**2 + mean_b**2 + c_1) * (var_a + var_b + c_2))
            )
    return np.mean(found)


def pairs(num_channels=3):
    """Noise, a bright gradient, white against nearly white, unrelated images, inverted ones."""
    rng = np.random.default_rng(0)
    shape = (13, 15, num_channels)
    noise = rng.integers(0, 256, shape)
    gradient = 230 + np.arange(15)[None, :, None] + np.zeros(shape, int)
    white = np.full(shape, 255)
    x = np.stack([noise, gradient, white, noise, noise])
    y = np.stack([noise + rng.integers(-9, 10, shape), gradient + rng.integers(-2, 3, shape), white, gradient, noise])
    y[2, 4, 4] -= 1
    y[4] = 255 - y[4]
    return x.clip(0, 255).astype(np.uint8), y.clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("num_channels", [1, 3])
def test_ssim_is_its_formula(num_channels):
    x, y = pairs(num_channels)
    expected = [ssim_of_windows(a, b) for a, b in zip(x, y, strict=True)]
    found = ssim(x, y)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected, atol=2e-6)
    assert found[4] < -0.9 < 0.9 < found[0] < 1  # it tells them apart
    np.testing.assert_allclose(ssim(x, x), 1, atol=1e-6)


def test_psnr_is_its_formula():
    x, y = pairs()
    error = np.square(x.astype(np.float64) - y).mean((1, 2, 3))
    np.testing.assert_allclose(psnr(x, y), 10 * np.log10(255**2 / error), rtol=1e-12)
    assert psnr(x[:1], x[:1]) == np.inf
    assert psnr(np.zeros((1, 2, 2, 1), np.uint8), np.full((1, 2, 2, 1), 255, np.uint8)) == 0
    # A large image, where sums in float32 would lose digits.
    large = np.random.default_rng(0).integers(0, 256, (2, 1, 512, 512, 3), np.uint8)
    error = np.square(large[0].astype(np.float64) - large[1]).mean()
    np.testing.assert_allclose(psnr(*large), 10 * np.log10(255**2 / error), rtol=1e-12)


def test_batches_do_not_matter(monkeypatch):
    x, y = pairs()
    expected = psnr(x, y), ssim(x, y)
    monkeypatch.setattr(reconstruction, "_VALUES_PER_BATCH", 2 * x[0].size)  # batches of 2, 2 and 1
    for found, values in zip((psnr(x, y), ssim(x, y)), expected, strict=True):
        np.testing.assert_allclose(found, values, rtol=1e-6)


@pytest.mark.parametrize(
    ("x", "y", "words"),
    [
        (np.zeros((2, 11, 11, 1), np.uint8), np.zeros((1, 11, 11, 1), np.uint8), "[2, 11, 11, 1] and [1, 11, 11, 1]"),
        (np.zeros((2, 11, 11, 1), np.uint8), np.zeros((2, 11, 11, 1), np.float32), "uint8 from 0 to 255, got float32"),
        (np.zeros((2, 10, 11, 1), np.uint8), np.zeros((2, 10, 11, 1), np.uint8), "11 x 11 pixels, got images of 10 x"),
    ],
)
def test_images_that_cannot_be_compared(x, y, words):
    with pytest.raises(ValueError) as info:
        ssim(x, y)
    assert words in str(info.value)


def extractor(distance="FID"):
    """Two features of an image, its mean and its contrast."""

    def apply(params, images):
        x = images.astype(jnp.float32)
        return {"features": jnp.stack([x.mean((1, 2, 3)), x.std((1, 2, 3))], 1)}

    return Extractor("two", apply, {}, "0" * 64, num_channels=3, distance=distance)


def test_scores_are_means_with_their_standard_errors():
    x, y = pairs()
    seen = []

    def distance(a, b):
        assert a.dtype == np.float32 and -1 <= float(a.min()) and float(a.max()) <= 1
        seen.append(a.shape)
        return jnp.abs(a - b).mean((1, 2, 3))

    scores = reconstruction_scores(x, y, extractor(), ("distance-two", distance))
    assert list(scores) == ["PSNR", "SSIM", "distance-two", "rFID"] and seen == [x.shape]
    distances = np.abs(x.astype(np.float64) - y).mean((1, 2, 3)) / 127.5
    for name, values in {"PSNR": psnr(x, y), "SSIM": ssim(x, y), "distance-two": distances}.items():
        assert scores[name].value == pytest.approx(values.mean(), rel=1e-6)
        assert scores[name].deviation == pytest.approx(values.std(ddof=1) / math.sqrt(5), rel=1e-5)
        assert scores[name].high - scores[name].low == pytest.approx(2 * 1.96 * scores[name].deviation)
    features = [np.stack([im.mean((1, 2, 3)), im.std((1, 2, 3))], 1) for im in (x.astype(float), y.astype(float))]
    assert scores["rFID"].value == pytest.approx(frechet_distance(*features), rel=1e-4)
    assert [score.is_better for score in scores.values()] == ["higher", "higher", "lower", "lower"]
    assert list(reconstruction_scores(x, y, None)) == ["PSNR", "SSIM"]
    small = reconstruction_scores(x[:, :8, :8], y[:, :8, :8], extractor("FD-cifar10"))  # smaller than a window
    assert list(small) == ["PSNR", "rFD-cifar10"]
    with pytest.warns(FewSamplesWarning):
        reconstruction_scores(x[:2], y[:2], extractor())


def test_exact_reconstructions_are_counted_apart():
    x, y = pairs()
    y[1] = x[1]
    scores = reconstruction_scores(x, y, None)
    assert scores["exact"].value == 0.2
    assert scores["PSNR"].value == pytest.approx(np.delete(psnr(x, y), 1).mean())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = reconstruction_scores(x, x, None)
    assert scores["PSNR"].value == np.inf and scores["exact"].value == 1
    assert as_json(scores)["PSNR"] == {"value": None, "standard_error": None, "is_better": "higher"}
    assert "| PSNR (dB) | inf |  | higher |" in markdown_table(scores).splitlines()


def test_scores_as_a_table_and_as_json():
    x, y = pairs()
    scores = reconstruction_scores(x, y, extractor())
    lines = markdown_table(scores).splitlines()
    assert lines[:2] == ["| score | value | standard error | better |", "| --- | --- | --- | --- |"]
    assert lines[2] == f"| PSNR (dB) | {scores['PSNR'].value:.4g} | {scores['PSNR'].deviation:.2g} | higher |"
    assert lines[4] == f"| rFID | {scores['rFID'].value:.4g} |  | lower |"
    found = json.loads(json.dumps(as_json(scores), allow_nan=False))
    assert found["SSIM"]["value"] == scores["SSIM"].value
    assert found["rFID"] == {"value": scores["rFID"].value, "standard_error": None, "is_better": "lower"}
