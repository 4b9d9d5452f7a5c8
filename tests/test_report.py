"""The page of a bundle: what stands on it, what it says of what is not there; how Chromium shows it."""

import base64
import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from chromium import Chromium, find_chromium
from onnx import TensorProto, helper
from scipy.special import softmax

from emoexport.bundle import Bundle
from emoexport.calib.sensitivity import Cost
from emoexport.calib.tuning import Setting, Trial, Tuning
from emoexport.decision import Decision
from emoexport.engines.timing import latency_of, ratio_of
from emoexport.errors import BadCheckpoint, UsageError
from emoexport.files import sha256_of
from emoexport.findings import find
from emoexport.labels import EMOTIONS
from emoexport.manifest import CalibrationEntry, FileEntry, GraphEntry, Manifest, MemberEntry, ViewEntry
from emoexport.metamorphic import RelationCheck
from emoexport.outcome import Outcome
from emoexport.page import Missing
from emoexport.parity import EngineFacts, ParityReport, VerifyFacts
from emoexport.report import write_report
from emoexport.saved_answers import SavedAnswers
from emoexport.statistics import Estimate
from emoexport.throughput import EngineSpeed, SpeedReport
from emoexport.train.checkpoint import DataRecord, MemberRecord, RunRecord
from emoexport.train.config import ModelConfig, RunConfig, TrainingConfig
from emoexport.verdict import Judgement, Limits

HOSTILE = "<script>alert('x')</script>"
BLOCKS = ("stem", "backbone.blocks.0", "backbone.blocks.1", "head")
ENGINES = {"onnxruntime-fp32": "fp32", "openvino-throughput-fp16": "fp16", "openvino-int8": "int8", "x-int8": "int8"}
WEIGHTS = "5" * 64


def write_graph(path: Path, kind: int) -> None:
    weight = helper.make_tensor("w", kind, (4, 7), np.zeros((4, 7)).ravel().tolist())
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["faces", "w"], ["probabilities"])],
        "fold",
        [helper.make_tensor_value_info("faces", kind, ("N", 4))],
        [helper.make_tensor_value_info("probabilities", kind, ("N", 7))],
        [weight],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), path)


def write_run(run: Path, *, sha256: str = WEIGHTS) -> Path:
    (run / "members").mkdir(parents=True)
    model = ModelConfig(backbone="convnext_atto", image_size=32)
    settings = TrainingConfig(members=1, epochs=3, phases=(0.5, 1.0), swa_from=3)
    member = MemberRecord(weights="1.safetensors", sha256=sha256, epoch=2, validation_accuracy=0.6, model=model)
    (run / "members/1.json").write_text(member.to_json())
    data = DataRecord(
        **dict.fromkeys(("seed", "skipped", "outside"), 0),
        **{"source": "drawn", "label_order": "fer2013", "splits": {}, "validation_from": "train"},
        **{"train_faces": 70, "train_sha256": "", "validation_faces": 7, "validation_sha256": ""},
    )
    record = RunRecord(
        config=RunConfig(model=model, training=settings),
        data=data,
        members=("members/1.json",),
        batch_size=8,
        accumulate=1,
        seconds=1.0,
        versions={},
    )
    (run / "run.json").write_text(record.to_json())
    (run / "metrics.csv").write_text(
        "epoch,train_accuracy,validation_accuracy,train_loss,validation_loss\n"
        "1,0.2,0.3,2,1.9\n2,0.4,0.6,1.5,1.4\n3,0.5,0.5,1,1\n"
    )
    return run


def tuned(*, block: str) -> Tuning:
    blocks = (*BLOCKS, block)
    cost, speed = Cost(changed=2, mended=1, broken=1, kl=1e-4), Estimate(value=1.1, low=1.05, high=1.15)
    alone = [
        Trial(kind="alone", precision=precision, left=tuple(name for name in blocks if name != one), cost=cost)
        for one in blocks
        for precision in ("int8", "fp16")
    ]
    without = [Trial(kind="without", precision="int8", left=(one,), times_as_fast=speed) for one in blocks]
    chosen = Trial(kind="search", precision="int8", left=("head",), cost=cost, times_as_fast=speed, ms_a_face=2.0)
    setting = Setting(
        **dict.fromkeys(("graph_sha256", "calibration_sha256", "faces_sha256"), "0" * 64),
        **{"precision": "int8", "engine": "openvino", "faces": 300, "batch": 16, "rounds": 9, "threads": None},
        machine={"processor": "one"},
    )
    return Tuning(
        created="2026-01-01",
        bundle_digest="0" * 64,
        setting=setting,
        max_drop=0.01,
        blocks=blocks,
        left=("head",),
        bound=-0.004,
        shared_with_gate=0,
        calibrated_on_noise=False,
        trials=(*alone, *without, chosen),
    ).sealed()


def made(path: Path, *, name: str = "drawn", tuning: Tuning | None = None, gflop: float | None = 0.1) -> Bundle:
    """A bundle of one member and one matrix product."""
    path.mkdir(parents=True)
    kinds = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "int8": TensorProto.FLOAT}
    for precision, kind in kinds.items():
        write_graph(path / f"model.{precision}.onnx", kind)
    (path / "calibration.json").write_text("{}")
    if tuning is not None:
        (path / "tuning.json").write_text(tuning.to_json())
    files = {file.name: FileEntry(sha256=sha256_of(file), bytes=file.stat().st_size) for file in sorted(path.iterdir())}
    member = MemberEntry(
        sha256=WEIGHTS,
        backbone=name,
        epoch=2,
        validation_accuracy=0.6,
        parameters=28,
        gflop_a_pass=gflop,
    )
    manifest = Manifest(
        created="2026-01-01T00:00:00+00:00",
        face_shape=(2, 2, 1),
        max_batch=64,
        labels=EMOTIONS,
        run="../../runs/x",
        members=(member,),
        views=(ViewEntry(name="identity", function="identity", parameters={}, mirrored=False),),
        decision=Decision(thresholds={"happy": 0.2}),
        graphs={key: GraphEntry(file=f"model.{key}.onnx", opset=20, operators={"MatMul": 1}) for key in kinds},
        calibration=CalibrationEntry(file="calibration.json", method="min-max", faces=512, data=name, split="train"),
        tuning="tuning.json" if tuning else None,
        data={"source": name, "train_faces": 70},
        versions={"torch": "2"},
        files=files,
    ).sealed()
    (path / "manifest.json").write_text(manifest.to_json())
    return Bundle.open(path)


def said(truth: np.ndarray, *, wrong: int, seed: int = 0) -> Outcome:
    rng = np.random.default_rng(seed)
    labels = truth.copy()
    labels[rng.permutation(len(truth))[:wrong]] = rng.integers(0, 7, wrong)
    logits = np.random.default_rng(1).normal(0, 0.6, (len(truth), 7))
    logits[np.arange(len(truth)), labels] += 3
    probabilities = softmax(logits, axis=1).astype(np.float32)
    return Outcome(probabilities, probabilities.argmax(axis=1), probabilities.max(axis=1))


def verified(bundle: Bundle, *, data: str = "drawn", digest: str = "", broken: str = "") -> None:
    """Write what `verify` writes, of made-up answers."""
    truth = np.arange(350) % 7
    relations = (RelationCheck(relation="identical", batch=1, largest_difference=0.0, allowed=1e-5),)
    engines = [
        EngineFacts(
            engine=name,
            precision=precision,
            file=f"model.{precision}.onnx",
            sha256="a" * 64,
            machine={"runtime": "one 1.0"},
            load_s=0.1,
            layers={"fp32": 30, precision: 12, "int64": 2},
            multiplications={precision: 12},
            time_share={} if name == "x-int8" else {"fp32": 0.2, precision: 0.8},
            in_graph={precision: 12},
            relations=relations,
            batches=(1, 16),
            proof=Judgement(verdict="certified"),
        )
        for name, precision in ENGINES.items()
        if not broken or name == broken
    ]
    answers = {name: said(truth, wrong=40 + 2 * number) for number, name in enumerate(ENGINES)}
    if broken:
        answers[broken] = answers[broken]._replace(probabilities=np.full((350, 7), np.nan, np.float32))
    facts = VerifyFacts(
        created="2026-01-02T00:00:00+00:00",
        bundle_digest=digest or bundle.manifest.digest,
        data=data,
        split="test",
        data_sha256="b" * 64,
        faces=350,
        skipped=0,
        engines=tuple(engines),
        batches=(1, 16),
        batch=16,
        latency={name: latency_of(np.array([1.0, 2.0])) for name in ("torch-fp32", *ENGINES)},
        size_bytes=dict.fromkeys(("fp32", "fp16", "int8"), 1000),
        notes=(f"Of {data}.",),
        machine={"processor": "one"},
    )
    rows = {"all": np.ones(350, bool), "clean": np.arange(350) > 20}
    saved = SavedAnswers(facts=facts, answers=answers, reference=said(truth, wrong=40), truth=truth, rows=rows)
    saved.write(bundle.path / "reports/answers.npz")
    bundle.write_report("parity", saved.judged(Limits()), "")


def timed(bundle: Bundle, *, digest: str = "", batches: tuple[int, ...] = (1, 4, 16)) -> None:
    """Write what `bench` writes, of made-up times."""
    rng = np.random.default_rng(0)
    results = []
    for batch in batches:
        slow = rng.gamma(400, 0.05, 20) * batch**0.7
        for number, name in enumerate(("torch-fp32", *ENGINES)):
            times = slow if not number else rng.gamma(400, 0.05, 20) * batch**0.6 / (1 + number)
            rate = 1000 * batch / float(np.median(times))
            results.append(
                EngineSpeed(
                    engine=name,
                    batch=batch,
                    latency_ms=latency_of(times),
                    ms_a_face=1000 / rate,
                    faces_a_second=rate,
                    passes_a_second=rate,
                    times_reference=ratio_of(slow, times),
                    share_of_peak=0.1 if name.endswith("fp32") else None,
                    samples_ms=tuple(times.tolist()),
                )
            )
    report = SpeedReport(
        created="2026-01-03T00:00:00+00:00",
        bundle_digest=digest or bundle.manifest.digest,
        passes_a_face=1,
        results=tuple(results),
        gemm_peak_tops={"fp32": 0.4},
        size_bytes={"fp32": 1000},
        machine={"processor": "one"},
    )
    bundle.write_report("bench", report, "")


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> Path:
    """The page of a bundle of which all is known, with names that would like to be code."""
    root = tmp_path_factory.mktemp("full")
    write_run(root / "runs/x")
    bundle = made(root / "build/x", name=HOSTILE, tuning=tuned(block="<i>neck</i> $x$"))
    verified(bundle, data=HOSTILE)
    timed(bundle)
    return write_report(bundle)


def test_a_page_of_all_there_is(full):
    text = full.read_text()
    for title in ("What was built from what", "Certificate", "Confusion", "Reliability", "Speed", "Precision"):
        assert f"<h2>{title}</h2>" in text
    assert text.count("<figure>") == 11
    assert 'class="missing"' not in text
    for said in ("openvino-int8", "n = 50", "paired 95 % interval", "Clopper-Pearson", WEIGHTS, "of 350, at most"):
        assert said in text
    assert not re.search(r"""(?:src|href)=["'](?!#|data:)""", text)
    assert "url(http" not in text
    assert str(full.parents[2]) not in text  # nobody's folders
    assert full.stat().st_size < 1_000_000


def test_names_do_not_become_code(full):
    text = full.read_text()
    assert "&lt;i&gt;neck&lt;/i&gt; $x$" in text
    assert "<i>" not in text
    assert "mathdefault" not in text
    assert "<script" not in text
    assert "&lt;script&gt;" in text


def test_every_drawing_has_words_and_a_name_of_its_own(full):
    text = full.read_text()
    drawn = re.findall(r'<svg viewBox="[^"]*" role="img" aria-label="([^"]*)">', text)
    assert len(drawn) == text.count("<svg") > 15
    assert all(len(words) > 40 for words in drawn)
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    svgs = "".join(re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL))
    assert not re.search(r"#[0-9a-fA-F]{3,8}\b(?!\w*[-\"])", re.sub(r'(?:href="|url\()#[\w-]+', "", svgs))


def test_what_is_missing_is_said_with_the_command_that_makes_it(tmp_path, monkeypatch, call):
    monkeypatch.chdir(tmp_path)
    made(Path("build/x"), gflop=None)
    code, out, _ = call("report")
    assert code == 0
    assert out == "report: build/x/reports/report.html\n"
    text = Path("build/x/reports/report.html").read_text()
    for command in ("verify build/x", "bench build/x", "tune build/x", "report build/x --run runs/x"):
        assert f"Next: <code>emoexport {command}</code>" in text
    assert "Not verified." in text
    assert text.count("<figure>") == 1
    assert write_report(Bundle.open(Path("build/x")), out=Path("again.html")).read_text() == text


def test_reports_of_another_bundle_are_not_shown(tmp_path):
    bundle = made(tmp_path / "x")
    verified(bundle, digest="f" * 64)
    timed(bundle, digest="f" * 64)
    text = write_report(bundle, out=tmp_path / "page.html").read_text()
    for name in ("parity", "bench"):
        assert f"reports/{name}.json is of another bundle (ffffffffffffffff…" in text
    assert "<b>engines</b> none verified" in text
    assert "at most" not in text


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('{"schema_version": 1}', "is of schema version 1, and 2 is read here"),
        ("{", "cannot be read"),
        ('{"schema_version": 2}', "Field required"),
        ("[]", "is of schema version None"),
    ],
)
def test_reports_that_cannot_be_read_are_a_sentence(tmp_path, content, told):
    bundle = made(tmp_path / "x")
    (bundle.path / "reports").mkdir()
    (bundle.path / "reports/parity.json").write_text(content)
    found = find(bundle).parity
    assert isinstance(found, Missing)
    assert told in found.sentence
    assert str(tmp_path) not in found.sentence
    assert found.command.startswith("emoexport verify ")


def test_answers_of_another_verify_are_not_drawn(tmp_path):
    bundle = made(tmp_path / "x")
    verified(bundle)
    path = bundle.path / "reports/answers.npz"
    saved = SavedAnswers.read(path)
    dataclasses.replace(saved, facts=saved.facts.model_copy(update={"created": "2025"})).write(path)
    assert "is not of the verify" in find(bundle).answers.sentence
    path.write_bytes(b"PK")
    assert "cannot be read" in find(bundle).answers.sentence
    path.unlink()
    assert "were not kept" in find(bundle).answers.sentence


def test_a_verdict_on_an_engine_that_was_built_again_is_not_shown(tmp_path):
    bundle = made(tmp_path / "x")
    verified(bundle)
    report = ParityReport.parse_json(bundle.path / "reports/parity.json")
    built = report.engines[0].model_copy(update={"file": f"engines/{report.engines[0].engine}.engine"})
    bundle.write_report("parity", report.model_copy(update={"engines": (built, *report.engines[1:])}), "")
    assert f"is of other files of {built.engine} than stand here now" in find(bundle).parity.sentence


def test_an_engine_that_answers_no_numbers(tmp_path):
    bundle = made(tmp_path / "x")
    verified(bundle, broken="x-int8")
    text = write_report(bundle).read_text()
    assert "✗</span> failed" in text
    assert "Confusion matrix of reference" in text
    assert "Confusion matrix of x-int8" not in text


def test_the_run_must_be_that_of_the_bundle(tmp_path):
    bundle = made(tmp_path / "x")
    with pytest.raises(BadCheckpoint):
        find(bundle, tmp_path)
    with pytest.raises(UsageError, match="is not the run"):
        find(bundle, write_run(tmp_path / "other", sha256="6" * 64))
    run = write_run(tmp_path / "moved")
    assert len(find(bundle, run).training.epochs) == 3
    (run / "metrics.csv").unlink()
    for spoil in (
        lambda file: file.write_text("epoch\n1\n"),
        lambda file: file.write_text(f"epoch\n{'1' * 200_000}\n"),  # more than the csv module takes
        lambda file: file.write_bytes(b"\xff"),
        lambda file: (file.unlink(), os.mkfifo(file)),  # which would be waited for
    ):
        spoil(run / "metrics.csv")
        assert "no metrics.csv that can be read" in find(bundle, run).training.sentence


def test_the_template_goes_into_wheels():
    root = Path(__file__).parents[1]
    config = (root / "pyproject.toml").read_text()
    assert '"emoexport" = ["py.typed", "templates/*", "web/*"]' in config
    assert {"report.html.j2", "report.css"} <= {file.name for file in (root / "exporter/templates").iterdir()}


def test_the_page_is_made_lazily():
    code = (
        "import sys, emoexport.cli; print([name for name in ('jinja2', 'matplotlib', 'torch') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    program = find_chromium()
    if program is None:
        pytest.skip("there is no Chromium here: apt-get install chromium")
    opened = Chromium(program, tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


FIGURES = """[...document.querySelectorAll("figure svg")].map(svg => {
  const box = svg.getBoundingClientRect(), scale = box.width / svg.viewBox.baseVal.width
  const boxes = [...svg.querySelectorAll("text")].map(text => [text.textContent, text.getBoundingClientRect()])
  return {
    name: svg.getAttribute("aria-label").slice(0, 60),
    width: box.width, height: box.height,
    drawn: [...svg.querySelectorAll("path")].filter(one => {
      const of = one.getBoundingClientRect()
      return of.width + of.height > 1
    }).length,
    smallest: Math.min(...[...svg.querySelectorAll("text")].map(
      one => scale * parseFloat(getComputedStyle(one).fontSize))),
    outside: boxes.filter(([, of]) => of.left < box.left - 2 || of.right > box.right + 2 || of.top < box.top - 2
      || of.bottom > box.bottom + 2).map(([words]) => words),
  }
})"""


@pytest.mark.parametrize("width", [1200, 360])
def test_chromium_draws_every_figure_and_fetches_nothing(browser, full, width):
    browser.open(full, width=width)
    assert browser.requests() == [full.resolve().as_uri()]
    assert browser.complaints() == []
    figures = browser.value(FIGURES)
    assert len(figures) > 15
    for figure in figures:
        assert figure["width"] > 200, figure
        assert figure["height"] > 100, figure
        assert figure["drawn"] >= 3, figure
        assert figure["smallest"] >= 8, figure
        assert figure["outside"] == [], figure
    browser.value("document.querySelectorAll('details').forEach(one => { one.open = true })")
    assert browser.value("document.documentElement.scrollWidth") <= width


COLOURS = """[...document.querySelectorAll("body, p, td, th, a, figcaption, summary, figure svg text")].map(one => {
  const style = getComputedStyle(one)
  return one instanceof SVGElement ? style.fill : style.color
})"""


def contrast(first: str, second: str) -> float:
    """Source: WCAG 2.2, relative luminance and contrast ratio."""

    def luminance(colour: str) -> float:
        parts = np.array([float(part) for part in re.findall(r"[\d.]+", colour)[:3]]) / 255
        linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


def test_chromium_shows_it_in_the_light_and_in_the_dark_and_prints_it_in_black_on_white(browser, full):
    browser.open(full, width=1200)
    for dark in (False, True):
        browser.show(dark=dark)
        ground = browser.value("getComputedStyle(document.body).backgroundColor")
        assert (contrast(ground, "rgb(0, 0, 0)") < 2) == dark
        colours = set(browser.value(COLOURS)) - {ground}  # which is in the cells of the confusion that are filled
        assert len(colours) >= 2
        assert min(contrast(ground, colour) for colour in colours) >= 4.5, colours
    browser.show(dark=True, media="print")
    assert browser.value("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    paper = base64.b64decode(browser.call("Page.printToPDF", printBackground=True)["data"])
    browser.show(dark=False)
    assert paper.startswith(b"%PDF")
    assert 5 < len(re.findall(rb"/Type\s*/Page\b", paper)) < 40
