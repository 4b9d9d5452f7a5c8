"""Graphs of single passes, cascades on engines, and `emoexport cascade`."""

import dataclasses
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vote_cubes import vote_cube

import emoexport
from emoexport import cascading, pass_opening
from emoexport.bundle import Bundle
from emoexport.cascade_claim import Claim
from emoexport.cascade_fit import fit_cascade
from emoexport.cascade_record import CascadeRecord, cascades_in, read_cascade
from emoexport.cascade_stages import Calls, choose_stages, milliseconds_a_face, with_stages
from emoexport.decision import Decision
from emoexport.engine_choice import best_graph_engine
from emoexport.engines import BACKENDS
from emoexport.errors import BadBundle, BadInput, UsageError
from emoexport.files import sha256_of
from emoexport.manifest import FileEntry, Manifest
from emoexport.metamorphic import check_relations
from emoexport.opening import open_cascade, open_engines
from emoexport.pass_engine import CascadeEngine, numbered
from emoexport.pass_graph import NumberedShow
from emoexport.pass_opening import open_passes
from emoexport.scoring import Scored, apart
from emoexport.train.dataset import Faces
from emoexport.views import VIEWS, View, zoom


@pytest.mark.parametrize("shape", [(32, 32, 1), (9, 14, 3)])
def test_views_by_number_are_the_views(shape):
    show = NumberedShow(list(VIEWS.values()), shape)
    faces = np.random.default_rng(1).integers(0, 256, (len(VIEWS), *shape), dtype=np.uint8)
    shown = show(torch.from_numpy(numbered(faces, np.arange(len(VIEWS)))), torch.float32)
    pictures = torch.from_numpy(faces).float().permute(0, 3, 1, 2) / 255
    for number, view in enumerate(VIEWS.values()):
        assert torch.allclose(shown[number], view(pictures[number][None])[0], rtol=0, atol=3e-7), view.name


def test_a_view_that_tables_do_not_tell_is_refused():
    def both(faces: torch.Tensor, *, factor: float) -> torch.Tensor:
        return zoom(faces, factor=factor) * 0.5

    with pytest.raises(UsageError, match="the view both both moves"):
        NumberedShow([View(name="both", function=both, parameters={"factor": 1.2})], (8, 8, 1))


@pytest.fixture(scope="module")
def opened(bundle, tmp_path_factory, quiet):
    """The passes of the tiny bundle, by ONNX Runtime in FP32, and the whole fold."""
    passes, graphs = open_passes(bundle, tmp_path_factory.mktemp("passes"), "onnxruntime", "fp32", console=quiet)
    (fold,) = open_engines(bundle, engines=["onnxruntime"], precisions=["fp32"])
    assert [graph.name for graph in graphs] == ["member-1.onnx", "member-2.onnx"]
    return passes, fold


def test_passes_are_those_of_the_fold(opened, faces):
    passes, fold = opened
    some = faces[0][:20]
    wanted = fold.scores(some)
    assert np.abs(passes.scores(some) - wanted).max() < 2e-6
    asked = [(1, 3), (0, 15), (1, 0)]
    found = passes.passes(some, asked)
    assert found.shape == (20, 3, 7)
    for column, (member, view) in enumerate(asked):
        assert np.abs(found[:, column] - wanted[:, member, view]).max() < 2e-6
    outcome = passes.run(some)
    assert (outcome.label == fold.run(some).label).all()
    assert passes.name == "passes-onnxruntime-fp32"


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino", "openvino-throughput"])
@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8", "int8-fp16"])
def test_passes_of_every_precision_are_those_of_the_fold(bundle, tmp_path, quiet, faces, backend, precision):
    row = BACKENDS[backend]
    if not row.is_installed() or precision not in row.precisions:
        pytest.skip(f"{backend} takes no {precision} here")
    passes, _ = open_passes(bundle, tmp_path, backend, precision, console=quiet)
    (fold,) = open_engines(bundle, engines=[backend], precisions=[precision])
    allowed = 1e-2 if precision == "fp16" else 5e-2  # kernels of other shapes round otherwise
    some = faces[0][:60]
    assert np.abs(passes.scores(some) - fold.scores(some)).max() < allowed
    assert (passes.run(some).label == fold.run(some).label).mean() > 0.96


@pytest.mark.slow
def test_an_engine_in_sizes_answers_as_one_without(bundle, opened, tmp_path, quiet, faces, monkeypatch):
    if not BACKENDS["openvino"].is_installed():
        pytest.skip("openvino is not installed")
    monkeypatch.setattr(pass_opening, "_LITTLE", -1.0)
    monkeypatch.setattr(pass_opening, "_PREPARED_SIZES", (1, 4))
    passes, _ = open_passes(bundle, tmp_path, "openvino", "fp32", console=quiet)
    assert passes.calls.prepared
    assert passes.calls.sizes == (1, 4)
    assert passes.members[0].max_batch == 4
    assert np.abs(passes.scores(faces[0][:7]) - opened[1].scores(faces[0][:7])).max() < 1e-5
    assert passes.executed(faces[0][:4]).layers == {}  # it was not told to tell


def cascade_of(rule: str, *, threshold: float | None):
    scores, truth = vote_cube(300, members=2, views=16, seed=1)
    found = fit_cascade(scores, truth, decision=Decision(), rule=rule, sizes=(1, 2, 5, 12), offsets=rule == "accuracy")
    return found.model_copy(update={"threshold": threshold})


@pytest.mark.parametrize(
    ("rule", "threshold"), [("agreement", 0.1), ("accuracy", 0.3), ("exact", 0.0), ("agreement", None)]
)
def test_a_cascade_on_an_engine_decides_as_on_its_cube(opened, faces, rule, threshold):
    passes, fold = opened
    cascade = cascade_of(rule, threshold=threshold)
    engine = CascadeEngine(passes.members, cascade, face_shape=passes.face_shape)
    images = faces[0]
    wanted = cascade.run(passes.scores(images))
    found = engine.walk(images)
    assert (found.stage == wanted.stage).all()
    assert (found.outcome.label == wanted.outcome.label).all()
    assert np.abs(found.outcome.probabilities - wanted.outcome.probabilities).max() < 1e-5
    assert engine.left == (0,) * len(cascade.stages)
    for batch in (1, 7, 70):
        assert (engine.run_all(images, batch_size=batch).label == wanted.outcome.label).all()
    assert engine.left == tuple(3 * np.bincount(wanted.stage, minlength=len(cascade.stages)))
    if rule == "exact":
        assert (wanted.outcome.label == fold.run_all(images).label).all()
    if threshold is None:
        assert set(found.passes) == {32}
    assert engine.name == f"cascade-{rule}-onnxruntime-fp32"


def test_rows_of_a_cascade_are_independent_though_faces_leave_it_at_different_stages(opened, faces):
    engine = CascadeEngine(opened[0].members, cascade_of("agreement", threshold=0.1), face_shape=opened[0].face_shape)
    checks = check_relations(engine, faces[0], (1, 2, 7, 16), allowed=1e-6, symmetric=False)
    assert [check for check in checks if not check.holds] == []
    assert sum(count > 0 for count in engine.left) > 1


def test_a_cascade_is_shared_by_threads_and_refuses_what_engines_do(opened, faces):
    engine = CascadeEngine(opened[0].members, cascade_of("agreement", threshold=0.1), face_shape=opened[0].face_shape)
    wanted = engine.walk(faces[0]).outcome.label
    found: dict[int, np.ndarray] = {}

    def work(number: int) -> None:
        found[number] = engine.run(faces[0]).label

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all((label == wanted).all() for label in found.values())
    assert sum(engine.left) == 4 * 70
    for bad in (faces[0].astype(np.float32), faces[0][:, :-1], faces[0][:0]):
        with pytest.raises(BadInput, match="needed are uint8 faces"):
            engine.run(bad)


@given(st.integers(1, 150), st.floats(0, 9), st.sampled_from([(1, 4, 16), (3,), (1, 2, 5, 7)]))
def test_calls_have_room_and_cost_least(rows, call, sizes):
    calls = Calls(sizes=sizes, call_ms=call, row_ms=1.0)
    found = calls.of(rows)
    assert set(found) <= set(sizes)
    assert sum(found) >= rows > sum(found[:-1])
    most = sizes[-1]
    least = {0: 0.0}
    for count in range(1, rows % most + 1):
        least[count] = min(call + size + least[max(0, count - size)] for size in sizes)
    assert calls.milliseconds(rows) == pytest.approx(rows // most * (call + most) + least[rows % most])


def test_calls_are_measured_as_a_line():
    found = Calls().measured(2, 3.0, 34, 19.0)
    assert (found.call_ms, found.row_ms) == (2.0, 0.5)
    assert Calls().measured(2, 3.0, 34, 2.0).row_ms == 0
    assert Calls().up_to(5).sizes == (1, 2, 3, 4, 5)


def test_stages_that_are_left_out_change_no_answer_of_the_others():
    scores, _ = vote_cube(200, seed=2)
    whole = fit_cascade(scores, decision=Decision(), sizes=(1, 2, 4, 8)).model_copy(update={"threshold": 0.05})
    some = with_stages(whole, [1, 3, 4])
    assert some.sizes.tolist() == [2, 8, 12]
    assert some.order(2) == whole.order(4)
    paths, fewer = whole.paths(scores), some.paths(scores)
    assert (fewer.risks == paths.risks[[1, 3, 4]]).all()
    assert (fewer.labels == paths.labels[[1, 3, 4]]).all()


def test_what_a_face_takes_is_the_sum_of_its_calls():
    scores, _ = vote_cube(23, seed=3)
    cascade = fit_cascade(scores, decision=Decision(), sizes=(1, 3))
    calls = Calls(sizes=(1, 4, 16), call_ms=2.0, row_ms=0.5)
    left = np.random.default_rng(0).integers(0, 3, 23)
    total = 0.0
    for start in range(0, 23, 5):
        part = left[start : start + 5]
        for stage, added in enumerate(cascade.stages):
            members = [member for member, _ in added.passes]
            for member in set(members):
                total += calls.milliseconds(int((part >= stage).sum()) * members.count(member))
    assert milliseconds_a_face(cascade, left, calls, 5) == pytest.approx(total / 23)


def test_as_many_stages_as_pay_for_themselves():
    scores, _ = vote_cube(400, seed=4)
    cascade = fit_cascade(scores, decision=Decision(), sizes=(1, 2, 4, 8))
    paths = cascade.paths(scores)

    def chosen(call: float) -> list[int]:
        calls = Calls(sizes=tuple(range(1, 257)), call_ms=call, row_ms=1.0)
        return choose_stages(cascade, paths, lambda _: 0.05, calls, 16)

    assert chosen(0.0) == [0, 1, 2, 3, 4]
    assert chosen(1e6) == [4]  # one stage asks every member once, two ask some of them twice
    assert 1 < len(chosen(10.0)) < 5


def test_coinciding_views_are_computed_once():
    entries = [SimpleNamespace(name=name, same_as=same) for name, same in (("a", None), ("b", "a"), ("c", None))]
    manifest = SimpleNamespace(members=[0, 1], views=entries, weights=None)
    found = Manifest.merged_weights.fget(manifest)
    assert found == pytest.approx(np.array([[1 / 3, 0, 1 / 6]] * 2))


def test_goals_become_claims():
    assert Claim.of_goals(None, None) == Claim(rule="agreement", epsilon=0.01)
    assert Claim.of_goals(2.0, None).epsilon == 0.02
    assert Claim.of_goals(None, 0.5) == Claim(rule="accuracy", max_drop=0.005)
    assert Claim.of_goals(2.0, 0.5) == Claim(rule="agreement", epsilon=0.02, max_drop=0.005)
    assert Claim.of_goals(None, None, exact=True).rule == "exact"
    with pytest.raises(UsageError, match="--exact loses nothing"):
        Claim.of_goals(1.0, None, exact=True)


def test_engines_that_are_made_of_no_graph_are_refused(bundle, tmp_path, quiet):
    with pytest.raises(UsageError, match="inductor takes no graphs"):
        open_passes(bundle, tmp_path, "inductor", "fp32", console=quiet)


@pytest.mark.slow
def test_a_compiler_takes_graphs_of_passes(bundle, tmp_path, quiet, monkeypatch):
    """TensorRT-RTX's builder reads them; its engines need a GPU to be opened."""
    if not BACKENDS["tensorrt-rtx"].is_installed():
        pytest.skip("tensorrt-rtx is not installed")
    asked: list[tuple] = []

    def opened(files: list[Path], backend: object, calls: Calls, **_: object) -> list:
        asked.append(([file.name for file in files], calls.sizes[-1]))
        raise BadInput("no GPU")

    monkeypatch.setattr(pass_opening, "open_members", opened)
    with pytest.raises(BadInput, match="no GPU"):
        open_passes(bundle, tmp_path, "tensorrt-rtx", "int8", console=quiet)
    assert asked == [(["member-1.engine", "member-2.engine"], 64)]
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "member-1.engine",
        "member-1.passport.json",
        "member-2.engine",
        "member-2.passport.json",
    ]


@pytest.mark.slow
def test_stacked_members_are_refused(stacked_bundle, tmp_path, quiet):
    with pytest.raises(UsageError, match="members are stacked"):
        open_passes(stacked_bundle, tmp_path, "onnxruntime", "fp32", console=quiet)


@pytest.fixture(scope="module")
def made(bundle, tmp_path_factory, quiet) -> tuple[Bundle, CascadeRecord]:
    """A copy of the tiny bundle with a cascade of wide limits."""
    folder = tmp_path_factory.mktemp("cascade")
    shutil.copytree(bundle.path, folder / "tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        # What calls cost here would choose the stages: on a busy machine so few that all faces leave alike.
        patch.setattr("emoexport.pass_opening._measured", lambda passes, console: passes.calls)
        copy = Bundle.open(Path("tiny"))
        run = bundle.run()
        record = cascading.make_cascade(
            copy, Claim.of_goals(10.0, None), engine="onnxruntime", precision="fp32", run=run, rounds=5, console=quiet
        )
    return Bundle.open(folder / "tiny"), record


def test_a_cascade_becomes_part_of_its_bundle(made, faces):
    bundle, record = made
    name = "cascade-agreement-onnxruntime-fp32"
    assert cascades_in(bundle.path) == [name] == [record.engine]
    assert read_cascade(bundle, name) == record
    assert record.verdict == "certified"
    assert record.certificate.epsilon == 0.1
    assert record.certificate.faces == record.shown.faces == sum(record.left) == 210
    assert record.shown.disagreement_bound_pct <= 10
    assert 1 <= record.passes_per_face < 32
    assert record.timing.times_full.value > 1
    assert "passes a face on average, at most 10 % of faces are decided otherwise" in record.sentences[0]
    engine = open_cascade(bundle, record)
    engine.run(faces[0])
    assert sum(engine.left) == 70


def test_a_cascade_is_loaded_by_its_rule_with_its_certificate(made, faces):
    bundle, record = made
    session = emoexport.load(bundle.path, cascade="agreement")
    assert session.engine == record.engine
    assert session.certificate is not None
    assert session.certificate.verdict == "certified"
    assert session.certificate.max_disagreement_pct == 10
    assert session.notes == ()
    assert session.batch == 16
    assert session.drift() is None
    assert sum(session.left) == 0
    with pytest.raises(BadInput, match="a cascade computes other passes of every face"):
        session.scores(faces[0][:1])
    assert session.run(faces[0]).label.shape == (70,)
    assert session.drift().faces == 70
    session.run(np.repeat(faces[0][:1], 2000, axis=0))  # all leave where this one does
    assert session.drift().drifted
    with pytest.raises(UsageError, match="no such cascade as exact; it has cascade-agreement"):
        emoexport.load(bundle.path, cascade="exact")


def test_predict_takes_a_cascade(made, call, tmp_path, faces):
    from PIL import Image

    for number, face in enumerate(faces[0][:3]):
        Image.fromarray(face[..., 0]).save(tmp_path / f"{number}.png")
    code, out, err = call("predict", tmp_path, "-b", made[0].path, "--cascade", "agreement", "--format", "csv")
    assert code == 0, err
    assert len(out.splitlines()) == 4
    assert "cascade-agreement-onnxruntime-fp32: With" in err


def test_bundles_without_a_cascade_say_how_to_make_one(bundle):
    with pytest.raises(BadBundle, match="has no cascade") as caught:
        emoexport.load(bundle.path, cascade="agreement")
    assert caught.value.hint == f"emoexport cascade {bundle.path}"


@pytest.mark.parametrize("what", ["record", "graph", "missing", "bundle", "name"])
def test_cascades_that_were_changed_are_not_used(made, tmp_path, what):
    bundle, record = made
    shutil.copytree(bundle.path, tmp_path / "b")
    folder = tmp_path / "b" / "cascades" / record.engine
    changed = dataclasses.replace(bundle, path=tmp_path / "b")
    name = record.engine
    if what == "record":
        file = folder / "cascade.json"
        file.write_text(file.read_text().replace('"delta": 0.05', '"delta": 0.01'))
    elif what == "graph":
        graph = folder / "member-2.onnx"
        graph.write_bytes(graph.read_bytes()[:-1] + b"\0")
    elif what == "missing":
        (folder / "member-1.onnx").unlink()
    elif what == "bundle":
        manifest = bundle.manifest.model_copy(update={"digest": "0" * 64})
        changed = dataclasses.replace(changed, manifest=manifest)
    else:
        name = "cascade-exact-onnxruntime-fp32"
        folder.rename(folder.with_name(name))
    with pytest.raises(BadBundle, match=r"was changed|is missing|of another bundle") as caught:
        read_cascade(changed, name)
    assert caught.value.hint.startswith("emoexport cascade")


def resealed(folder: Path, **changes: object) -> None:
    """What a cascade's record says, with a digest that fits."""
    record = CascadeRecord.parse_json(folder / "cascade.json")
    (folder / "cascade.json").write_text(record.model_copy(update=changes).sealed().to_json())


def test_cascades_whose_record_was_made_to_fit_are_not_used_either(made, tmp_path):
    bundle, record = made
    shutil.copytree(bundle.path, tmp_path / "b")
    copy, folder = dataclasses.replace(bundle, path=tmp_path / "b"), tmp_path / "b" / "cascades" / record.engine
    graph = folder / "member-1.onnx"
    entry = record.files[graph.name]
    resealed(folder, files=record.files | {graph.name: entry.model_copy(update={"bytes": 2**40})})
    with pytest.raises(BadBundle, match="the limit is"):
        read_cascade(copy, record.engine)
    model = onnx.load(graph)
    model.graph.initializer[0].data_location = onnx.TensorProto.EXTERNAL
    model.graph.initializer[0].external_data.add(key="location", value="../../labels.txt")
    graph.write_bytes(model.SerializeToString())
    entry = FileEntry(sha256=sha256_of(graph), bytes=graph.stat().st_size)
    resealed(folder, files=record.files | {graph.name: entry})
    with pytest.raises(BadBundle, match=r"has its weights in '\.\./\.\./labels\.txt'"):
        read_cascade(copy, record.engine)
    (folder / "cascade.json").rename(tmp_path / "cascade.json")
    (folder / "cascade.json").symlink_to(tmp_path / "cascade.json")
    with pytest.raises(BadBundle, match="leads out of"):
        read_cascade(copy, record.engine)


@pytest.mark.parametrize(
    ("change", "said"),
    [({"backend": "foo"}, "runs no cascades"), ({"backend": "inductor"}, "runs no cascades"), ({}, "needed are files")],
    ids=str,
)
def test_a_cascade_opens_graphs_alone(made, tmp_path, change, said):
    """A package of machine code among them would be run."""
    bundle, record = made
    shutil.copytree(bundle.path, tmp_path / "b")
    copy, graphs = dataclasses.replace(bundle, path=tmp_path / "b"), ("x.pt2", *record.graphs[1:])
    named = record.model_copy(update={"graphs": graphs, **change})
    folder = tmp_path / "b" / "cascades" / named.engine
    if change:
        (folder.parent / record.engine).rename(folder)
    resealed(folder, graphs=graphs, **change)
    with pytest.raises(BadBundle, match=said):
        read_cascade(copy, named.engine)


@pytest.mark.slow
@pytest.mark.parametrize("goal", [("--exact",), ("--max-drop", 20), ("--max-disagreement", 0.1)])
def test_the_command_makes_and_shows_a_cascade(made, bundle, call, monkeypatch, goal):
    monkeypatch.chdir(made[0].path.parent)
    settings = ("--engine", "onnxruntime", "--precision", "fp32", "--rounds", 5, "--run", bundle.run())
    code, out, err = call("cascade", "tiny", *goal, *settings)
    if goal == ("--max-disagreement", 0.1):
        assert code == 6
        assert "Nothing is certified: 210 faces do not show that at most 0.1 % of faces" in out
        assert "0 labels of this engine's own vote differ. More faces would do" in out
        assert "keeps the cascade-agreement-onnxruntime-fp32 that is certified; this one is not" in out
        assert read_cascade(made[0], made[1].engine) == made[1]
        return
    rule = "exact" if goal == ("--exact",) else "accuracy"
    record = read_cascade(made[0], f"cascade-{rule}-onnxruntime-fp32")
    assert record.sentences[0] in out
    assert f"verdict: {record.verdict}" in out
    if rule == "exact":  # as sure as anything is on 210 faces
        assert (code, record.verdict) == (6, "not enough evidence"), err
        assert record.shown.disagreements == 0
    else:
        assert (code, record.verdict) == (0, "certified"), err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--exact", "--max-drop", 1), "--exact loses nothing"),
        (("--max-disagreement", 0), "found a limit of 0; a cascade is certified for more than 0"),
        (("--max-drop", 100), "found a limit of 100; a cascade is certified for more than 0 and less than 100"),
        (("--delta", 0), "found --delta 0; needed is a probability"),
        (("--batch", 65), "takes up to 64 faces in a call"),
        (("--engine", "inductor"), "inductor takes no graphs"),
    ],
)
def test_what_cannot_be_had_is_told_before_anything_is_computed(bundle, call, monkeypatch, options, said):
    monkeypatch.setattr(cascading, "prepare_cascade", lambda *_, **__: pytest.fail("it was begun"))
    code, _, err = call("cascade", bundle.path, *options)
    assert code == 2
    assert said in err


def faces_of(images: np.ndarray, labels: np.ndarray) -> Faces:
    return Faces(images=images, labels=labels, flagged=np.zeros(len(labels), dtype=bool))


def scored(faces: int, seed: int) -> Scored:
    """A cube of drawn scores with faces of their own."""
    scores, truth = vote_cube(faces, seed=seed)
    images = np.random.default_rng(seed).integers(0, 256, (faces, 4, 4, 1), dtype=np.uint8)
    record = SimpleNamespace(data="drawn", split="test", faces=faces, data_sha256="0" * 64)
    cube = SimpleNamespace(scores=scores, labels=truth, record=record)
    return Scored(cube, (), faces_of(images, truth), np.ones(faces, dtype=bool), "")


def test_faces_that_fitted_show_nothing():
    some, others = scored(20, 1), scored(30, 2)
    assert apart(others, some).rows.all()
    pictures = np.concatenate([others.faces.images[:25], some.faces.images[:5]])
    mixed = others._replace(faces=faces_of(pictures, others.faces.labels))
    assert apart(mixed, some).rows.sum() == 25
    with pytest.raises(UsageError, match="are those that chose; needed are others"):
        apart(some, some)


def test_a_threshold_whose_engine_decides_otherwise_is_not_certified(quiet, monkeypatch):
    """Labels of the engine itself count, not those of the cube; the next smaller threshold is asked then."""
    fitting, showing = vote_cube(1500, seed=1), scored(2000, 2)
    cascade = fit_cascade(*fitting, decision=Decision(), sizes=(1, 2, 4))
    own = cascade.run(showing.cube.scores).outcome.label
    claim, asked = Claim.of_goals(2.0, None), []

    def answers(opened: object, *_: object) -> np.ndarray:
        asked.append(opened.threshold)
        label = opened.run(showing.cube.scores).outcome.label
        if len(asked) <= 2:  # rounded otherwise
            label[:40] = (own[:40] + 1) % 7
        return label

    monkeypatch.setattr(cascading, "_answers", answers)
    prepared = SimpleNamespace(
        fit=SimpleNamespace(cascade=cascade), claim=claim, batch=16, opened=lambda cascade: cascade
    )
    opened, certificate, label = cascading._shown(prepared, showing, own, quiet)
    assert len(asked) == 3
    assert asked[0] > asked[1] > asked[2] == opened.threshold == certificate.threshold
    assert (label != own).sum() == certificate.disagreements


def test_the_best_engine_made_of_graphs_is_taken(bundle):
    assert best_graph_engine(bundle) == ("onnxruntime", "fp32")
    assert best_graph_engine(bundle, precision="int8")[1] == "int8"
    with pytest.raises(UsageError, match="inductor takes no graphs"):
        best_graph_engine(bundle, engine="inductor")


def test_of_several_cascades_the_fastest_that_holds_is_loaded(made, tmp_path, faces):
    bundle, record = made
    shutil.copytree(bundle.path, tmp_path / "b")
    folder = tmp_path / "b" / "cascades"
    other = record.model_copy(
        update={"backend": "openvino", "timing": record.timing.model_copy(update={"ms_a_face": 1e-6})}
    ).sealed()
    shutil.copytree(folder / record.engine, folder / other.engine)
    (folder / other.engine / "cascade.json").write_text(other.to_json())
    session = emoexport.load(tmp_path / "b", cascade="agreement")  # the other one has no certificate
    assert session.engine == record.engine
    (folder / other.engine / "member-1.onnx").unlink()
    session = emoexport.load(tmp_path / "b", cascade="agreement")
    assert session.engine == record.engine
    assert any("member-1.onnx is missing" in note for note in session.notes)
    with pytest.raises(BadBundle, match=r"member-1\.onnx is missing"):
        emoexport.load(tmp_path / "b", cascade=other.engine)
