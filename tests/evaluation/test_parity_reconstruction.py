"""PSNR and SSIM agree with scikit-image, which also leaves out windows that cross the edge."""

import numpy as np
import pytest

from diffussm_jax.evaluation.reconstruction import psnr, ssim

metrics = pytest.importorskip("skimage.metrics", reason="parity of PSNR and SSIM needs scikit-image")


@pytest.mark.parametrize("num_channels", [1, 3])
def test_scores_of_images(num_channels):
    rng = np.random.default_rng(0)
    y, x, c = np.mgrid[:40, :33, :num_channels]
    smooth = 127 + 120 * np.sin(x / 9 + y / 31 + c)
    pairs = [
        [np.clip(image + rng.normal(0, s, image.shape), 0, 255).astype(np.uint8) for s in (0, 12)]
        for image in (smooth, 250 + smooth / 100, rng.uniform(0, 256, smooth.shape))
    ]
    originals, others = (np.stack(images) for images in zip(*pairs, strict=True))
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255}
    expected = [metrics.structural_similarity(*pair, channel_axis=-1, **options) for pair in pairs]
    np.testing.assert_allclose(ssim(originals, others), expected, atol=2e-6)
    expected = [metrics.peak_signal_noise_ratio(*pair, data_range=255) for pair in pairs]
    np.testing.assert_allclose(psnr(originals, others), expected, rtol=1e-12)
