"""Engines against the reference: hand-made outcomes, saved answers, and verify on a bundle."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from emoexport import certification, opening
from emoexport.bundle import Bundle
from emoexport.engines.certificate import read_certificate
from emoexport.engines.onnxruntime_engine import OnnxRuntimeEngine
from emoexport.engines.passport import Passport
from emoexport.errors import BadData
from emoexport.labels import EMOTIONS
from emoexport.outcome import Outcome
from emoexport.parity import ParityReport, compare
from emoexport.precision import PRECISIONS
from emoexport.saved_answers import SavedAnswers
from emoexport.statistics import exact_interval, wilson_interval
from emoexport.verdict import Limits

LOOSE = Limits(max_drop_points=5, max_disagreement_pct=5)
ONE = {"engines": ["onnxruntime"], "precisions": ["fp32"], "rounds": 1}


def outcome(n: int = 1000, seed: int = 0) -> Outcome:
    probabilities = np.random.default_rng(seed).dirichlet(np.ones(7), size=n).astype(np.float32)
    label = probabilities.argmax(axis=1)
    return Outcome(probabilities, label, probabilities.max(axis=1))


def judge(engine: Outcome, reference: Outcome, truth: np.ndarray, precision: str = "fp32"):
    return compare(engine, reference, truth, name="x", precision=precision)


def test_the_same_outcome_is_certified():
    result = judge(outcome(), outcome(), outcome().label)
    assert (result.verdict, result.reasons) == ("certified", ())
    assert result.accuracy.value == 1
    assert result.agreement.n == 1000
    assert result.agreement.low == pytest.approx(0.9963, abs=1e-3)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_wrong_rows_fail_at_every_precision(precision):
    """Two rows in a batch of 16 swapped, as runtimes have been seen to do."""
    right = outcome()
    order = np.arange(1000)
    for start in range(0, 992, 16):
        order[[start, start + 1]] = order[[start + 1, start]]
    wrong = Outcome(*(column[order] for column in right))
    result = judge(wrong, right, right.label, precision)
    assert result.verdict == "failed"
    assert any("of the labels differ" in reason for reason in result.reasons)


def test_nan_fails():
    right = outcome()
    broken = right._replace(probabilities=np.where(np.arange(7) == 3, np.nan, right.probabilities))
    result = judge(broken, right, right.label, "int8")
    assert result.verdict == "failed"
    assert result.max_difference == float("inf")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_difference_beyond_rounding_fails_whatever_is_decided(precision):
    right, tolerance = outcome(), PRECISIONS[precision].tolerance
    off = right.probabilities.copy()
    off[7, right.label[7]] += 1.1 * tolerance.max_difference
    result = judge(right._replace(probabilities=off), right, right.label, precision)
    assert (result.verdict, result.evidence.disagreements) == ("failed", 0)
    assert "a probability differs by" in result.reasons[0]


def test_a_drop_in_accuracy_fails():
    right = outcome()
    label = right.label.copy()
    label[:30] = (label[:30] + 1) % 7
    result = judge(right._replace(label=label), right, right.label, "int8")
    assert [reason for reason in result.reasons if "points of accuracy are lost" in reason]
    assert (result.evidence.engine_only_right, result.evidence.reference_only_right) == (0, 30)


def test_intervals_are_those_of_the_books():
    low, high = wilson_interval(76, 100)
    assert (low, high) == (pytest.approx(0.6677, abs=1e-3), pytest.approx(0.8331, abs=1e-3))
    low, high = exact_interval(1000, 1000)
    assert (low, high) == (pytest.approx(1 - 0.00368, abs=1e-4), 1.0)


@pytest.mark.parametrize(("interval", "least"), [(wilson_interval, 0.93), (exact_interval, 0.95)])
def test_intervals_cover(interval, least):
    counts, times = np.unique(np.random.default_rng(0).binomial(300, 0.9, size=2000), return_counts=True)
    covered = [low <= 0.9 <= high for low, high in (interval(int(count), 300) for count in counts)]
    assert times[covered].sum() / 2000 >= least


@pytest.fixture(scope="module")
def verified(bundle, quiet, tmp_path_factory) -> tuple[Bundle, ParityReport]:
    """A copy of the bundle, verified whole."""
    path = Path(shutil.copytree(bundle.path, tmp_path_factory.mktemp("verified") / "tiny"))
    mine = Bundle.open(path)
    run = bundle.run()
    return mine, certification.verify(mine, run=run, limit=200, limits=LOOSE, rounds=2, batches=[1, 8], console=quiet)


def test_verify_certifies_and_writes_what_can_be_read_again(verified):
    mine, report = verified
    assert report.verdict == "certified", [engine.reasons for engine in report.engines]
    assert report.faces == 200
    verdicts = {engine.engine: engine.verdict for engine in report.engines}
    assert verdicts["onnxruntime-fp32"] == "certified"
    assert verdicts["onnxruntime-fp16"] == "not judged"  # its CPU provider multiplies in FP32
    assert set(report.latency) == {"torch-fp32", *verdicts}
    assert {check.batch for engine in report.engines for check in engine.relations} == {1, 8}
    assert {"mirrored", "alone"} <= {check.relation for check in report.engines[0].relations}
    assert ParityReport.parse_json(mine.path / "reports/parity.json") == report
    markdown = (mine.path / "reports/parity.md").read_text()
    for words in (
        "| PyTorch | fp32 |",
        "Verdict: **certified**",
        "not judged. ONNX Runtime multiplies the graph of FP16",
    ):
        assert words in markdown
    assert str(mine.path.parent) not in markdown


def test_each_engine_has_its_certificate_in_its_passport(verified, call):
    mine, report = verified
    for engine in report.engines:
        found = read_certificate(mine.path, engine.engine)
        assert found.verdict == engine.verdict
        assert (found.batches, found.faces, found.data_sha256) == ([1, 8], 200, report.data_sha256)
        assert found.engine_sha256 == engine.sha256 == mine.graph_sha256(engine.precision)
        assert found.max_drop_points == 5
        assert found.machine["runtime"].split()[-1][0].isdigit()
    assert Bundle.open(mine.path) == mine  # its seal holds
    code, out, _ = call("inspect", mine.path)
    assert (code, "certificates: points" in out, "-1.33" in out) == (0, True, True), out
    shown = json.loads(call("inspect", mine.path, "--json")[1])["certificates"]
    assert {name: found["verdict"] for name, found in shown.items()} == {
        one.engine: one.verdict for one in report.engines
    }


def test_what_certificates_say_to_who_uses_the_engines(verified, tmp_path):
    mine, _ = verified
    copy = Bundle.open(Path(shutil.copytree(mine.path, tmp_path / "tiny")))
    opened = opening.open_engines(copy, engines=["onnxruntime"], precisions=["fp32", "fp16"])
    noted = opening.certificate_notes(copy, opened, [1, 32])
    assert [note.partition(":")[0] for note in noted] == ["Not certified", "Certified, but not for these batches"]
    assert "onnxruntime-fp16 (not judged)" in noted[0]
    assert "onnxruntime-fp32 (32)" in noted[1]
    file = copy.path / "engines" / "onnxruntime-fp32"
    passport = Passport.read(file)
    elsewhere = passport.certificate | {"machine": passport.certificate["machine"] | {"processor": "a Z80"}}
    other = passport.certificate | {"engine_sha256": "0" * 64}
    for changed, said in ((elsewhere, "it is for the processor a Z80; here is"), (other, "it is of another file")):
        dataclasses.replace(passport, certificate=changed).write(file)
        (note,) = opening.certificate_notes(copy, opened[:1], [1])
        assert note.startswith("Their certificates are stale: onnxruntime-fp32 (")
        assert said in note
    text = (file.parent / "onnxruntime-fp32.passport.json").read_text()
    (file.parent / "onnxruntime-fp32.passport.json").write_text(text.replace('"certified"', '"certified "'))
    assert read_certificate(copy.path, "onnxruntime-fp32") is None  # edited
    (note,) = opening.certificate_notes(copy, opened[:1], [1])
    assert note == f"No certificate: onnxruntime-fp32. Next: emoexport verify {copy.path}"


def test_saved_answers_are_judged_again_by_other_limits(verified, call, tmp_path):
    mine, report = verified
    answers = mine.path / certification.ANSWERS
    saved = SavedAnswers.read(answers)
    again = saved.judged(LOOSE)
    assert again == report
    assert saved.judged(Limits()).verdict == "not enough evidence"
    written = (mine.path / "reports/parity.json").read_bytes()
    code, out, _ = call("verify", "--from", answers, "--max-drop", 5, "--max-disagreement", 5)
    assert (code, "verdict: certified" in out) == (0, True)
    code, out, _ = call("verify", "--from", answers)
    assert (code, bool(re.search(r"allowed are 0\.5: 5\d\d such faces would do", out))) == (6, True), out
    assert (mine.path / "reports/parity.json").read_bytes() == written  # without a bundle nothing is written
    copy = Path(shutil.copytree(mine.path, tmp_path / "tiny"))
    code, out, _ = call("verify", copy, "--from", answers)
    assert code == 6
    assert read_certificate(copy, "onnxruntime-fp32").verdict == "not enough evidence"
    assert json.loads((copy / "reports/parity.json").read_text())["limits"]["max_drop_points"] == 0.5


@pytest.mark.parametrize("how", ["missing", "cut", "other", "text", "uneven", "fields", "edited", "bomb"])
def test_what_is_no_saved_answer(verified, tmp_path, how, monkeypatch):
    content = (verified[0].path / certification.ANSWERS).read_bytes()
    path = tmp_path / "answers.npz"
    if how == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif how == "text":
        path.write_text("no archive")
    elif how == "bomb":
        path.write_bytes(content)
        monkeypatch.setattr("emoexport.saved_answers._MOST_BYTES", 10_000)
    elif how == "other":
        np.savez(path, faces=np.zeros(3))
    elif how in ("uneven", "fields", "edited"):
        with np.load(verified[0].path / certification.ANSWERS) as archive:
            arrays = dict(archive)
        if how == "uneven":
            arrays["truth"] = arrays["truth"][:-1]
        elif how == "edited":
            arrays["truth"] = (arrays["truth"] + 1) % 7
        else:
            arrays["facts"] = np.frombuffer(b'{"schema": 9}', dtype=np.uint8)
            del arrays["sha256"]
        np.savez(path, **arrays)
    with pytest.raises(BadData, match="was changed after" if how in ("uneven", "edited") else r"answers\.npz"):
        certification.judge_again(path, Limits())


def test_answers_of_another_bundle_are_not_taken(verified):
    mine = verified[0]
    other = dataclasses.replace(mine, manifest=mine.manifest.model_copy(update={"digest": "0" * 64}))
    with pytest.raises(BadData, match="is of the bundle") as caught:
        certification.judge_again(mine.path / certification.ANSWERS, Limits(), other)
    assert "emoexport verify" in caught.value.hint


def test_from_runs_nothing_so_it_takes_no_choice_of_what_to_run(call, tmp_path):
    code, _, err = call("verify", "--from", tmp_path / "x.npz", "--data", "synthetic:70")
    assert (code, "--data chooses what is run; --from runs nothing." in err) == (2, True)
    code, _, err = call("verify", "--from", tmp_path / "x.npz")
    assert (code, "x.npz holds no answers that verify has saved" in err) == (4, True)


def test_verify_catches_an_engine_with_one_row_off(bundle, quiet, monkeypatch):
    honest = OnnxRuntimeEngine._run

    def rolled(self, faces):
        return Outcome(*(np.roll(column, 1, axis=0) for column in honest(self, faces)))

    monkeypatch.setattr(OnnxRuntimeEngine, "_run", rolled)
    report = certification.verify(bundle, **ONE, limit=60, batches=[8], console=quiet)
    assert report.verdict == "failed"
    reasons = " ".join(report.engines[0].reasons)
    assert "its answers do not go together at batch 8, 'alone'" in reasons
    assert "a probability differs by" in reasons
    assert read_certificate(bundle.path, "onnxruntime-fp32").verdict == "failed"


def test_verify_catches_rows_that_depend_on_each_other_though_all_labels_are_right(bundle, quiet, monkeypatch):
    honest = OnnxRuntimeEngine._run

    def leaking(self, faces):
        found = honest(self, faces)
        more = np.float32(2e-5) * (len(faces) == 1)
        return found._replace(probabilities=found.probabilities + more, confidence=found.confidence + more)

    monkeypatch.setattr(OnnxRuntimeEngine, "_run", leaking)
    report = certification.verify(bundle, **ONE, limits=LOOSE, limit=100, batches=[8], console=quiet)
    assert report.results[0].verdict == "certified"  # its answers to batches are right
    assert report.verdict == report.engines[0].verdict == "failed"


def test_faces_that_were_trained_on_certify_nothing(bundle):
    console = Console(record=True, width=200)
    report = certification.verify(bundle, **ONE, split="train", limit=20, limits=LOOSE, console=console)
    assert "says nothing of new faces" in console.export_text()
    assert report.verdict == "not enough evidence"
    assert any("says nothing of new faces" in reason for reason in report.engines[0].reasons)


def test_more_faces_than_an_engine_takes(bundle, call):
    code, _, err = call("verify", bundle.path, "--batch", 65)
    assert (code, "found --batch 65" in err, "next: --batch 64" in err) == (2, True, True)


@pytest.mark.parametrize("confidence", [np.nan, -1.0])
def test_a_confidence_that_is_none_fails(confidence):
    right = outcome()
    result = judge(right._replace(confidence=np.full(1000, confidence, dtype=np.float32)), right, right.label)
    assert result.verdict == "failed"


def test_an_engine_that_raises_has_failed_and_the_others_are_judged(bundle, quiet, monkeypatch):
    """Its earlier certificate holds no more."""
    honest = OnnxRuntimeEngine._run

    def breaks(self, faces):
        if self.precision == "int8" and len(faces) == 8:
            raise RuntimeError("out of memory.\nTry less.")
        return honest(self, faces)

    monkeypatch.setattr(OnnxRuntimeEngine, "_run", breaks)
    choice = {"engines": ["onnxruntime"], "precisions": ["fp32", "int8"], "limit": 100, "batches": [8], "rounds": 1}
    report = certification.verify(bundle, **choice, limits=LOOSE, console=quiet)
    assert {one.engine: one.verdict for one in report.engines} == {
        "onnxruntime-fp32": "certified",
        "onnxruntime-int8": "failed",
    }
    assert report.engines[1].reasons == ("it does not answer: out of memory",)
    assert read_certificate(bundle.path, "onnxruntime-int8").verdict == "failed"
    assert "it does not answer: out of memory" in (bundle.path / "reports/parity.md").read_text()
    assert SavedAnswers.read(bundle.path / certification.ANSWERS).judged(LOOSE) == report


def test_faces_of_which_none_is_clean_certify_nothing(bundle, quiet, tmp_path, faces):
    from PIL import Image

    for split in ("train", "test"):  # every one of these stands in training too
        for row in range(14):
            folder = tmp_path / "D" / split / EMOTIONS[int(faces[1][row])]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(faces[0][row, :, :, 0]).save(folder / f"{row}.png")
    very = Limits(max_drop_points=60, max_disagreement_pct=60)
    report = certification.verify(bundle, **ONE, data=str(tmp_path / "D"), split="test", limits=very, console=quiet)
    assert report.verdict == "not enough evidence"
    assert any("not one of these faces is clean" in reason for reason in report.engines[0].reasons) or any(
        "were trained on" in reason or "members were made" in reason for reason in report.engines[0].reasons
    )


def test_a_precision_that_no_engine_here_runs_is_an_error(bundle, call):
    code, _, err = call("verify", bundle.path, "--engine", "onnxruntime", "--precision", "fp32", "--precision", "fp8")
    assert (code, "fp8 is asked for, and no engine that was opened is of it" in err) == (3, True), err
