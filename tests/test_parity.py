import numpy as np
import pytest
from rich.console import Console

from emoexport import pipeline
from emoexport.engines.onnxruntime_engine import OnnxRuntimeEngine
from emoexport.outcome import Outcome
from emoexport.parity import ParityReport, compare
from emoexport.precision import PRECISIONS
from emoexport.statistics import exact_interval, wilson_interval


def outcome(n: int = 1000, seed: int = 0) -> Outcome:
    probabilities = np.random.default_rng(seed).dirichlet(np.ones(7), size=n).astype(np.float32)
    label = probabilities.argmax(axis=1)
    return Outcome(probabilities, label, probabilities.max(axis=1))


def judge(engine: Outcome, reference: Outcome, truth: np.ndarray, precision: str = "fp32"):
    return compare(engine, reference, truth, name="x", precision=precision, tolerance=PRECISIONS[precision].tolerance)


def test_the_same_outcome_passes():
    result = judge(outcome(), outcome(), outcome().label)
    assert result.verdict == "passed"
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
    assert any("labels agree" in failure for failure in result.failures)


def test_nan_fails():
    right = outcome()
    broken = right._replace(probabilities=np.where(np.arange(7) == 3, np.nan, right.probabilities))
    result = judge(broken, right, right.label, "int8")
    assert result.verdict == "failed"
    assert result.max_difference == float("inf")


def test_a_drop_in_accuracy_fails_though_labels_mostly_agree():
    right = outcome()
    label = right.label.copy()
    label[:20] = (label[:20] + 1) % 7
    result = judge(right._replace(label=label), right, right.label, "int8")
    assert [failure for failure in result.failures if "accuracy drops by 2.00 points" in failure]
    assert (result.engine_only_right, result.reference_only_right) == (0, 20)


def test_intervals_are_those_of_the_books():
    low, high = wilson_interval(76, 100)
    assert (low, high) == (pytest.approx(0.6677, abs=1e-3), pytest.approx(0.8331, abs=1e-3))
    low, high = exact_interval(1000, 1000)
    assert (low, high) == (pytest.approx(1 - 0.00368, abs=1e-4), 1.0)


@pytest.mark.parametrize(("interval", "least"), [(wilson_interval, 0.93), (exact_interval, 0.95)])
def test_intervals_cover(interval, least):
    counts = np.random.default_rng(0).binomial(300, 0.9, size=2000)
    covered = [low <= 0.9 <= high for low, high in (interval(int(count), 300) for count in counts)]
    assert np.mean(covered) >= least


def test_verify_passes_writes_its_reports_and_reads_them_back(bundle, quiet):
    report = pipeline.verify(bundle, limit=200, rounds=2, batch=8, console=quiet)
    assert report.verdict == "passed", [result.failures for result in report.results]
    assert report.faces == 200
    assert {result.engine for result in report.results} >= {"onnxruntime-fp32", "onnxruntime-int8"}
    assert set(report.latency) == {"torch-fp32", *(result.engine for result in report.results)}
    again = ParityReport.parse_json(bundle.path / "reports/parity.json")
    assert again == report
    markdown = (bundle.path / "reports/parity.md").read_text()
    assert "| fp32 | PyTorch |" in markdown
    assert str(bundle.path.parent) not in markdown


def test_verify_catches_an_engine_with_one_row_off(bundle, quiet, monkeypatch):
    honest = OnnxRuntimeEngine._run

    def rolled(self, faces):
        return Outcome(*(np.roll(column, 1, axis=0) for column in honest(self, faces)))

    monkeypatch.setattr(OnnxRuntimeEngine, "_run", rolled)
    report = pipeline.verify(bundle, engines=["onnxruntime"], limit=60, rounds=1, batch=8, console=quiet)
    assert report.verdict == "failed"
    assert (bundle.path / "reports/parity.json").is_file()


def test_verify_says_when_faces_were_trained_on(bundle):
    console = Console(record=True, width=200)
    pipeline.verify(
        bundle, split="train", limit=20, rounds=1, engines=["onnxruntime"], precisions=["fp32"], console=console
    )
    assert "says nothing of new faces" in console.export_text()
