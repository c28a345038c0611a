"""The small classifier learns, keeps its weights, and is trained anew for other images."""

import dataclasses

import numpy as np
import pytest

from diffussm_jax.data.sources import Digits
from diffussm_jax.evaluation import classifier
from diffussm_jax.evaluation.classifier import CLASSIFIERS, classifier_extractor, train_classifier
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
    import jax

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
