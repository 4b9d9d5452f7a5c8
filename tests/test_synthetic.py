import time

import numpy as np
import pytest

from emoexport.train.synthetic import EXPRESSIONS, synthetic_faces


def test_faces_are_uint8_grey_and_balanced():
    images, labels = synthetic_faces(200, size=40, seed=3)
    assert images.shape == (200, 40, 40, 1)
    assert images.dtype == np.uint8
    assert labels.dtype == np.int64
    counts = np.bincount(labels, minlength=7)
    assert counts.max() - counts.min() <= 1
    assert set(labels[:70]) == set(range(7))
    assert images.std(axis=(1, 2, 3)).min() > 5  # no blank face


def test_a_longer_draw_begins_with_the_shorter():
    short, short_labels = synthetic_faces(33, seed=8)
    long, long_labels = synthetic_faces(300, seed=8)
    assert np.array_equal(short, long[:33])
    assert np.array_equal(short_labels, long_labels[:33])
    other, _ = synthetic_faces(33, seed=9)
    assert not np.array_equal(short, other)


def test_no_two_faces_are_alike():
    images, _ = synthetic_faces(500, size=24)
    assert len({image.tobytes() for image in images}) == 500


def test_expressions_are_the_seven_emotions_in_order():
    assert list(EXPRESSIONS) == ["angry", "disgust", "fear", "happy", "sad", "surprise", "neutral"]
    assert len(set(EXPRESSIONS.values())) == 7


def ridge_accuracy(difficulty: float) -> float:
    """Held-out accuracy of a linear classifier on pixels: a floor for what can be learnt."""
    images, labels = synthetic_faces(1600, size=24, seed=1, difficulty=difficulty)
    pixels = images.reshape(len(images), -1) / 255.0
    pixels = (pixels - pixels.mean(axis=1, keepdims=True)) / pixels.std(axis=1, keepdims=True)
    train, test = pixels[:1200], pixels[1200:]
    weights = np.linalg.solve(train.T @ train + 30 * np.eye(train.shape[1]), train.T @ np.eye(7)[labels[:1200]])
    return float(((test @ weights).argmax(axis=1) == labels[1200:]).mean())


def test_emotions_can_be_learnt_and_difficulty_makes_it_harder():
    posed, usual, hard = (ridge_accuracy(difficulty) for difficulty in (0.0, 1.0, 2.0))
    assert posed > 0.85
    assert posed > usual + 0.1
    assert usual > hard


@pytest.mark.parametrize(
    "arguments",
    [{"n": 0}, {"n": 5, "size": 15}, *({"n": 5, "difficulty": bad} for bad in (-0.1, float("inf"), float("nan")))],
)
def test_what_makes_no_sense_is_refused(arguments):
    with pytest.raises(ValueError, match=r"\d"):
        synthetic_faces(**arguments)


def test_drawing_is_fast():
    start = time.process_time()
    synthetic_faces(1000)
    assert time.process_time() - start < 5
