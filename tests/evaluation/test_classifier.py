"""The small classifier learns, keeps its weights, and is trained anew for other images."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffussm_jax.data.sources import Digits
from diffussm_jax.evaluation import classifier
from diffussm_jax.evaluation.classifier import (
    CLASSIFIERS,
    Classifier,
    classifier_extractor,
    layer_features,
    train_classifier,
)
from diffussm_jax.evaluation.extractor import FEATURES, PROBABILITIES


def arrays(split):
    source = Digits(split)
    return np.stack([source[i].image for i in range(len(source))]), np.array(
        [source[i].label for i in range(len(source))]
    )


@pytest.fixture(scope="module")
def quick():
    """Three classes of digits that are told apart in a few steps."""
    training = dataclasses.replace(
        CLASSIFIERS["digits"], num_epochs=12, widths=(16, 16), num_classes=3, learning_rate=0.02
    )
    images, labels = arrays("train")
    return training, images[labels < 3], labels[labels < 3]


def test_it_learns_to_tell_classes_apart(quick, tmp_path, monkeypatch):
    training, images, labels = quick
    monkeypatch.setitem(CLASSIFIERS, "digits", training)
    lines = []
    extractor = classifier_extractor("digits", images, labels, tmp_path, lines.append)
    held_out, targets = arrays("eval")
    outputs = extractor(held_out[targets < 3])
    assert outputs[FEATURES].shape == (len(outputs[PROBABILITIES]), 16)
    np.testing.assert_allclose(outputs[PROBABILITIES].sum(1), 1, rtol=1e-5)
    assert (outputs[PROBABILITIES].argmax(1) == targets[targets < 3]).mean() > 0.9
    # The weights are kept, and those of other images are others.
    again = classifier_extractor("digits", images, labels, tmp_path, lines.append)
    assert again.sha256 == extractor.sha256 and len(lines) == 1 and "Training the classifier" in lines[0]
    np.testing.assert_array_equal(again(held_out[:3])[FEATURES], outputs_of(extractor, held_out[:3]))
    larger = images.repeat(4, 1).repeat(4, 2)  # of which the means over blocks are taken, in training too
    again = classifier_extractor("digits", larger, labels, tmp_path, lines.append)
    assert again.sha256 == extractor.sha256 and len(lines) == 1
    np.testing.assert_array_equal(outputs_of(again, larger[:3]), outputs_of(extractor, images[:3]))
    other = classifier_extractor("digits", images[:-1], labels[:-1], tmp_path, lines.append)
    assert other.sha256 != extractor.sha256 and len(lines) == 2
    (path, _) = sorted(tmp_path.iterdir())
    for file in tmp_path.iterdir():
        file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match=f"{path.stem[:10]}.*damaged.*delete it"):
        classifier_extractor("digits", images, labels, tmp_path)


def outputs_of(extractor, images):
    return extractor(images)[FEATURES]


def test_shifted_and_mirrored_images_are_moved_ones():
    """A bright pixel in the middle ends up to a pixel away, on either side, and in no other value."""
    image = np.zeros((200, 5, 5, 1), np.uint8)
    image[:, 2, 1] = 255
    training = dataclasses.replace(CLASSIFIERS["digits"], image_size=5, max_shift=1, is_flipped=True)
    moved = np.asarray(classifier._augmented(image, jax.random.key(0), training))[..., 0]
    assert (moved.sum((1, 2)) == 255).all()
    _, rows, columns = np.nonzero(moved)
    assert set(rows) == {1, 2, 3} and set(columns) == {0, 1, 2, 3, 4}


def test_images_of_another_size_or_number_of_classes_are_refused(quick):
    training, images, labels = quick
    with pytest.raises(ValueError, match="8 x 8 in 3 classes.* in 2 classes"):
        train_classifier(images[labels < 2], labels[labels < 2], training)
    with pytest.raises(ValueError, match="8 x 8"):
        train_classifier(images[:, :4], labels, training)


def random_params(name):
    """Of a classifier; gains and biases are not what they start as."""
    training = CLASSIFIERS[name]
    model = Classifier(training.widths, training.num_classes)
    like = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, training.num_channels)))["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(0, max(leaf.size, 20) ** -0.25, leaf.shape).astype(np.float32), like)


def layers_by_hand(x, params, num_layers):
    """In float64: convolutions as sums over shifted images, GroupNorm of 8 groups, ReLU, pooling of 2 x 2 before."""
    found = []
    for i in range(num_layers):
        if i:
            B, H, W, C = x.shape
            x = x[:, : H // 2 * 2, : W // 2 * 2].reshape(B, H // 2, 2, W // 2, 2, C).max((2, 4))
        for j in range(2):
            kernel, bias = (np.float64(params[f"conv_{i}_{j}"][key]) for key in ("kernel", "bias"))
            B, H, W, _ = x.shape
            padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
            x = sum(padded[:, p : p + H, q : q + W] @ kernel[p, q] for p in range(3) for q in range(3)) + bias
            groups = x.reshape(B, H * W, 8, -1)
            mean, var = groups.mean((1, 3), keepdims=True), groups.var((1, 3), keepdims=True)
            norm = params[f"norm_{i}_{j}"]
            x = ((groups - mean) / np.sqrt(var + 1e-6)).reshape(x.shape) * norm["scale"] + norm["bias"]
            x = np.maximum(x, 0)
        found.append(x)
    return found


@pytest.mark.parametrize(
    ("name", "shape"), [("digits", (2, 8, 8, 1)), ("digits", (1, 11, 6, 1)), ("cifar10", (1, 9, 12, 3))]
)
def test_layers_are_their_formulas_at_any_size(name, shape):
    """Values, and the derivative in a direction, as float64's differences have it."""
    params, num_layers = random_params(name), len(CLASSIFIERS[name].widths)
    rng = np.random.default_rng(1)
    x, direction = rng.uniform(-1, 1, shape), rng.normal(size=shape)
    layers = layer_features(name, params)

    def total(x):
        return sum(jnp.square(layer).mean() for layer in layers(x)), layers(x)

    (_, found), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(jnp.float32(x))
    expected = layers_by_hand(x, params, num_layers)
    assert [layer.shape for layer in found] == [layer.shape for layer in expected]
    assert all(layer.dtype == jnp.float32 for layer in found) and len(found) == num_layers
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max())
    step = 1e-6 * direction
    ends = [sum(np.square(layer).mean() for layer in layers_by_hand(x + s, params, num_layers)) for s in (step, -step)]
    assert (gradient * direction).sum() == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-3)


def test_the_features_are_the_mean_of_the_last_layer():
    params = random_params("digits")
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1), np.uint8)
    features, _ = Classifier(CLASSIFIERS["digits"].widths, 10).apply({"params": params}, images)
    last = layer_features("digits", params)(images.astype(np.float32) / 127.5 - 1)[-1]
    np.testing.assert_allclose(features, last.mean((1, 2)), rtol=1e-5, atol=1e-6)


def test_images_that_the_layers_cannot_take():
    layers = layer_features("cifar10", random_params("cifar10"))
    for shape in ((1, 32, 32, 1), (1, 3, 32, 3), (32, 32, 3)):
        with pytest.raises(ValueError, match=r"cifar10 takes x \[B, H, W, 3\] of at least 4 x 4 pixels, got \["):
            layers(jnp.zeros(shape))
