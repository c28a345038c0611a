"""Scores of generated images, and the networks that they are computed with.

inception, dinov2, classifier    networks; extractor, pretrained, resize serve them
frechet      Fréchet distance and its extrapolation, streamed means and covariances
fidelity     Inception score, precision and recall, density and coverage, KID, Gaussian MMD
neighbours   nearest neighbours among training images, and a test for copies
reconstruction  PSNR, SSIM and more of an autoencoder's reconstructions
bootstrap    intervals
distances    blocks of squared distances on the devices, for fidelity and neighbours
"""

from diffussm_jax.evaluation.bootstrap import Interval, proportion_interval
from diffussm_jax.evaluation.dinov2 import DINOv2, dinov2_extractor
from diffussm_jax.evaluation.extractor import Extractor
from diffussm_jax.evaluation.fidelity import density_coverage, gaussian_mmd, inception_score, kid, precision_recall
from diffussm_jax.evaluation.frechet import Moments, RunningMoments, frechet_distance, frechet_infinity
from diffussm_jax.evaluation.inception import Inception, inception_extractor
from diffussm_jax.evaluation.neighbours import copy_test, nearest
from diffussm_jax.evaluation.reconstruction import psnr, reconstruction_scores, ssim

__all__ = [
    "DINOv2",
    "Extractor",
    "Inception",
    "Interval",
    "Moments",
    "RunningMoments",
    "copy_test",
    "density_coverage",
    "dinov2_extractor",
    "frechet_distance",
    "frechet_infinity",
    "gaussian_mmd",
    "inception_extractor",
    "inception_score",
    "kid",
    "nearest",
    "precision_recall",
    "proportion_interval",
    "psnr",
    "reconstruction_scores",
    "ssim",
]
