"""Each relation is broken by an engine with just that fault, and by no honest one."""

import numpy as np
import pytest

from emoexport.engines.base import Engine
from emoexport.metamorphic import RELATIONS, check_relations
from emoexport.outcome import Outcome

BATCHES = (1, 2, 16)


class Honest(Engine):
    """Says of a face what its mean brightness says."""

    backend = "onnxruntime"

    def __init__(self):
        super().__init__(precision="fp32", face_shape=(4, 4, 1), max_batch=64)
        self.calls = 0

    def _run(self, faces):
        self.calls += 1
        mean = faces.mean(axis=(1, 2, 3)) / 255
        return self.outcome(np.stack([mean, 1 - mean], axis=1))

    def outcome(self, probabilities):
        return Outcome(probabilities.astype(np.float32), probabilities.argmax(axis=1), probabilities.max(axis=1))

    def _scores(self, faces):
        raise NotImplementedError


class MixesRows(Honest):
    def _run(self, faces):
        return Outcome(*(np.roll(column, 1, axis=0) for column in super()._run(faces)))


class KnowsItsPlace(Honest):
    def _run(self, faces):
        found = super()._run(faces).probabilities
        return self.outcome(found + 1e-3 * np.arange(len(found))[:, None])


class LooksAround(Honest):
    def _run(self, faces):
        found = super()._run(faces).probabilities
        return self.outcome(found + 1e-3 * faces.mean() / 255)


class KnowsTheBatch(Honest):
    def _run(self, faces):
        return self.outcome(super()._run(faces).probabilities + 1e-3 * len(faces))


class Replays(Honest):
    def _run(self, faces):
        honest = super()._run(faces)
        self.kept = getattr(self, "kept", {})
        return self.kept.setdefault(len(faces), honest)


class SeesSides(Honest):
    def _run(self, faces):
        return self.outcome(super()._run(faces).probabilities + 1e-3 * faces[:, :1, :1, 0, None].mean((1, 2)) / 255)


class Mislabels(Honest):
    def _run(self, faces):
        found = super()._run(faces)
        return found._replace(label=1 - found.label) if len(faces) == 1 else found


class LosesConfidence(Honest):
    def _run(self, faces):
        found = super()._run(faces)
        return found._replace(confidence=np.full(len(faces), np.nan, dtype=np.float32))


class ForgetsNan(Honest):
    def _run(self, faces):
        return self.outcome(super()._run(faces).probabilities * np.nan)


def broken(engine: Engine, symmetric: bool = True) -> set[str]:
    faces = np.random.default_rng(0).integers(0, 255, (16, 4, 4, 1), dtype=np.uint8)
    checks = check_relations(engine, faces, BATCHES, allowed=1e-5, symmetric=symmetric)
    assert {check.batch for check in checks} == set(BATCHES)
    return {check.relation for check in checks if not check.holds}


def test_an_honest_engine_breaks_none():
    assert broken(Honest()) == set()


@pytest.mark.parametrize(
    ("engine", "relations"),
    [
        (MixesRows, {"identical", "permuted", "alone", "padded"}),
        (KnowsItsPlace, {"identical", "permuted", "alone"}),
        (LooksAround, {"identical", "alone", "padded"}),
        (KnowsTheBatch, {"alone"}),
        (Replays, {"identical", "permuted", "alone"}),
        (SeesSides, {"mirrored"}),
        (Mislabels, {"consistent", "alone"}),
        (LosesConfidence, set(RELATIONS)),
        (ForgetsNan, set(RELATIONS)),
    ],
)
def test_each_fault_breaks_its_relations(engine, relations):
    assert broken(engine()) == relations


def test_a_vote_without_mirror_images_need_not_be_symmetric():
    assert broken(SeesSides(), symmetric=False) == set()


def test_an_engine_that_answers_otherwise_from_its_third_call_on():
    class Drifts(Honest):
        def _run(self, faces):
            return self.outcome(super()._run(faces).probabilities + 1e-3 * (self.calls > 2))

    assert "repeated" in broken(Drifts())

    class ForgetsLater(Honest):
        def _run(self, faces):
            return self.outcome(super()._run(faces).probabilities * (np.nan if self.calls > 2 else 1))

    faces = np.zeros((2, 4, 4, 1), dtype=np.uint8)
    held = check_relations(ForgetsLater(), faces, [2], allowed=1e-5, symmetric=True)
    assert not next(check for check in held if check.relation == "repeated").holds
