"""The choice of passes at build, and the weighted bundle that comes of it, through the command line."""

import json
import shlex
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from emoexport import certification, cli, opening, sessions
from emoexport.bundle import Bundle
from emoexport.cube import Cube
from emoexport.decision import Decision
from emoexport.errors import UsageError
from emoexport.fold import Fold
from emoexport.passes import Choice, pass_weights
from emoexport.precision import PRECISIONS
from emoexport.reference import Reference
from emoexport.rivals import PlainRival
from emoexport.summary import summarize
from emoexport.views import VIEWS, View, zoom

OPTIONS = ["--member", "2=3", "--member", "1=0.5", "--view", "gamma", "--view", "flip=2.5", "--view", "still-flipped"]
OTHERWISE = "The decision was fitted on the run's vote"


@pytest.fixture(scope="module", autouse=True)
def still():
    """A row that does nothing to the mirrored face, as the row flip does."""
    view = View(name="still-flipped", function=zoom, parameters={"factor": 1.0}, mirrored=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(VIEWS, view.name, view)
        yield


@pytest.fixture(scope="module")
def built(run_dir, tmp_path_factory, int8_is_slower) -> tuple[Bundle, str]:
    """A bundle of chosen, weighted passes at every precision, and what `build` said."""
    out = tmp_path_factory.mktemp("build") / "chosen"
    arguments = [
        "build",
        run_dir,
        "-o",
        out,
        *OPTIONS,
        "--fp16",
        "--int8",
        "--keep-rejected",
        "--calib-size",
        35,
        "--max-batch",
        64,
    ]
    with int8_is_slower():
        done = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.stderr
    return Bundle.open(out), done.stdout


def test_the_manifest_says_what_was_chosen(built, bundle):
    chosen, said = built
    manifest = chosen.manifest
    assert [member.sha256 for member in manifest.members] == [
        member.sha256 for member in reversed(bundle.manifest.members)
    ]
    assert [member.weight for member in manifest.members] == [3.0, 0.5]
    assert [(view.name, view.weight, view.same_as) for view in manifest.views] == [
        ("gamma", 1.0, None),
        ("flip", 2.5, None),
        ("still-flipped", 1.0, "flip"),
    ]
    assert np.allclose(manifest.weights, np.outer([3, 0.5], [1, 2.5, 1]) / (3.5 * 4.5))
    assert OTHERWISE in said
    assert bundle.manifest.weights is None


def test_the_command_that_makes_it_again_makes_this_choice(built, bundle):
    words = shlex.split(built[0].build_command())
    assert words[-7:-4] == ["--fp16", "--int8", "--keep-rejected"]
    taken = {
        option: [words[at + 1] for at, word in enumerate(words) if word == option] for option in ("--member", "--view")
    }
    assert Choice.of_options(taken["--member"], taken["--view"]) == built[0].manifest.choice
    assert not {"--member", "--view"} & set(bundle.build_command().split())


@pytest.mark.slow
def test_verify_and_bench_pass(built, call):
    path = built[0].path
    code, out, err = call(
        "verify", path, "--limit", "100", "--rounds", "1", "--max-drop", "9", "--max-disagreement", "9"
    )
    assert code == 0, out + err
    parity = json.loads((path / "reports/parity.json").read_text())
    assert max(row["max_difference"] for row in parity["results"] if row["precision"] == "fp32") < 1e-5
    code, out, err = call("bench", path, "--rounds", "2", "--batch", "2", "--precision", "fp32")
    assert code == 0, err
    assert json.loads(out.strip().splitlines()[-1])["passes_a_face"] == 4


def test_inspect_counts_the_passes_that_are_computed(built, bundle, call, monkeypatch):
    monkeypatch.chdir(built[0].path.parent)  # where folders for what is temporary have long names
    code, out, err = call("inspect", built[0].path.name)
    assert code == 0, err
    assert "4 (2 members x 2 of 3 views)" in out
    for words in ("weight", "members 2, 1", "same as"):
        assert words in out
    assert max(map(len, out.splitlines())) <= 80
    assert summarize(built[0]).gflop_a_face == pytest.approx(summarize(bundle).gflop_a_face * 2 / 16)
    plain = call("inspect", bundle.path)[1]
    assert "same as" not in plain
    assert "of the run" not in plain
    assert "weight " not in plain.split("graphs")[0]


def test_the_cube_votes_as_the_bundle_does(built, faces, call, tmp_path):
    chosen = built[0]
    code, _, err = call("cube", chosen.path, "--limit", "40", "-o", tmp_path / "x")
    assert code == 0, err
    cube = Cube.open(tmp_path / "x")
    assert (cube.record.member_weights, cube.record.view_weights) == ((3.0, 0.5), (1.0, 2.5, 1.0))
    scores = np.asarray(cube.scores, dtype=np.float64)
    assert np.abs(cube.vote() - np.average(scores, axis=(1, 2), weights=chosen.manifest.weights)).max() < 1e-12
    assert np.abs(cube.vote(weights=np.ones((2, 3))) - scores.mean(axis=(1, 2))).max() < 1e-12
    heavy = (scores[:, 0, 0] + 2.5 * scores[:, 0, 1]) / 3.5
    assert np.abs(cube.vote(members=[0], views=[0, 1]) - heavy).max() < 1e-12


def test_the_graphs_vote_as_the_reference_does(built, faces):
    reference = sessions.open_reference(built[0])[0]
    equal = Decision().decide(reference.scores(faces[0]).mean(axis=(1, 2)))
    engine = opening.open_engines(built[0], engines=["onnxruntime"], precisions=["fp32"])[0]
    found, wanted = engine.run_all(faces[0]), reference.run(faces[0])
    assert np.abs(found.probabilities - wanted.probabilities).max() < 1e-5
    assert np.abs(found.probabilities - equal.probabilities).max() > 1e-3
    assert np.abs(engine.scores(faces[0][:8]) - reference.scores(faces[0][:8])).max() < 1e-5


def test_a_choice_that_is_the_runs_own_vote_says_nothing(run_dir):
    views = json.loads((Path(run_dir) / "run.json").read_text())["config"]["views"]
    assert Choice().is_full_vote(2, views)
    assert Choice(members={2: 3.0, 1: 3.0}, views=dict.fromkeys(reversed(views), 0.1)).is_full_vote(2, views)
    assert not Choice(members={2: 3.0, 1: 2.0}).is_full_vote(2, views)
    assert not Choice(members={2: 1.0}).is_full_vote(2, views)
    assert not Choice(views={"zoom": 1.0}).is_full_vote(2, views)


def test_pass_weights_are_products_that_sum_to_1_at_every_scale():
    members, views = np.array([3.0, 0.5]), np.array([1.0, 2.5, 1.0])
    wanted = np.outer(members, views) / (3.5 * 4.5)
    for scale in (1.0, 1e-300, 1e300):
        assert np.abs(pass_weights(members * scale, views * scale) - wanted).max() < 1e-15
    assert pass_weights([0.1, 0.1], [7.0, 7.0, 7.0]) is None


@pytest.mark.parametrize(
    ("members", "views", "said"),
    [
        ([], ["zoom="], "--view zoom=: the weight is ''"),
        ([], ["zoom=inf"], "the weight is 'inf'"),
        ([], ["zoom=0"], "needed is a finite number above 0"),
        ([], ["zoom", "zoom"], "names 'zoom' twice"),
        (["1.5"], [], "'1.5' is no number of a member"),
        (["1", "+1=2"], [], "names one member twice"),
    ],
)
def test_choices_that_make_no_sense_are_refused(members, views, said):
    with pytest.raises(UsageError, match=said.replace("+", r"\+")) as caught:
        Choice.of_options(members, views)
    assert caught.value.hint
    assert caught.value.exit_code == 2


# Single passes: those that are named and no others.

SINGLE = ["--pass", "2:identity=2", "--pass", "1:flip", "--pass", "2:zoom-flipped=0.5", "--pass", "1:still-flipped=3"]


@pytest.fixture(scope="module")
def sparse(run_dir, tmp_path_factory) -> Bundle:
    """A bundle of four passes, two of which show the same picture, at FP32 and FP16, which was calibrated."""
    out = tmp_path_factory.mktemp("build") / "sparse"
    arguments = ["build", run_dir, "-o", out, *SINGLE, "--fp16", "--calib-size", 35, "--max-batch", 64]
    done = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.stderr
    assert OTHERWISE in done.stdout
    return Bundle.open(out)


@pytest.mark.slow
def test_single_passes_are_computed_and_no_others(sparse, bundle):
    manifest = sparse.manifest
    assert [member.sha256 for member in manifest.members] == [one.sha256 for one in reversed(bundle.manifest.members)]
    assert [view.name for view in manifest.views] == ["identity", "flip", "zoom-flipped", "still-flipped"]
    assert np.allclose(manifest.weights, np.array([[2, 0, 0.5, 0], [0, 1, 0, 3]]) / 6.5)
    assert manifest.computed.tolist() == [[True, False, True, False], [False, True, False, False]]
    assert manifest.passes_a_face == 3
    assert manifest.gflop_a_face == pytest.approx(bundle.manifest.gflop_a_face * 3 / 32)
    words = shlex.split(sparse.build_command())
    again = [words[at + 1] for at, word in enumerate(words) if word == "--pass"]
    assert Choice.of_options([], [], again) == manifest.choice


@pytest.mark.slow
def test_engines_of_single_passes_answer_as_the_reference_does(sparse, bundle, faces):
    reference = sessions.open_reference(sparse)[0]
    whole = sessions.open_reference(bundle)[0]
    images = faces[0][:24]
    every = whole.scores(images)
    places = {view.name: number for number, view in enumerate(whole.views)}
    wanted = np.zeros((24, 2, 4, 7), dtype=np.float32)
    for row, column, member, view in (
        (0, 0, 1, "identity"),
        (1, 1, 0, "flip"),
        (0, 2, 1, "zoom-flipped"),
        (1, 3, 0, "flip"),
    ):
        wanted[:, row, column] = every[:, member, places[view]]
    assert np.abs(reference.scores(images) - wanted).max() < 1e-6
    vote = np.average(wanted.astype(np.float64), axis=(1, 2), weights=[[2, 0, 0.5, 0], [0, 1, 0, 3]])
    decided = sparse.manifest.decision.decide(vote)
    for engine in opening.open_engines(sparse, device="cpu"):
        limit = PRECISIONS[engine.precision].tolerance.max_difference
        found = engine.run(images)
        assert np.abs(found.probabilities - decided.probabilities).max() <= max(limit, 1e-5), engine.name
        scores = engine.scores(images)
        assert scores.shape == wanted.shape
        assert not scores[:, 0, 1].any()
        assert np.abs(scores - wanted).max() <= max(limit, 1e-5), engine.name
        one, rest = engine.run(images[:1]), engine.run(images[1:])
        assert np.allclose(np.concatenate([one.probabilities, rest.probabilities]), found.probabilities, atol=1e-4)


@pytest.mark.slow
def test_single_passes_in_8_bits_answer_as_the_reference_does(run_dir, faces, tmp_path, int8_is_slower, call):
    arguments = ["build", run_dir, "-o", tmp_path / "x", *SINGLE, "--int8", "--keep-rejected", "--calib-size", 35]
    with int8_is_slower():
        assert call(*arguments, "--max-batch", 64)[0] == 0
    built = Bundle.open(tmp_path / "x")
    wanted = sessions.open_reference(built)[0].run(faces[0][:24])
    for engine in opening.open_engines(built, device="cpu", precisions=["int8"]):
        limit = PRECISIONS["int8"].tolerance.max_difference
        assert np.abs(engine.run(faces[0][:24]).probabilities - wanted.probabilities).max() <= limit, engine.name


@pytest.mark.slow
def test_plain_exports_compute_single_passes_only(sparse, faces):
    """A rival computes what the bundle does, and no more."""
    reference = sessions.open_reference(sparse)[0]
    asked: list[int] = []

    def session(pictures: np.ndarray) -> np.ndarray:
        asked.append(len(pictures))
        return np.zeros((len(pictures), 7), dtype=np.float32)

    row = SimpleNamespace(name="plain", runtime=lambda *_: ("fp32", [session, session]))
    rival = PlainRival(row, reference, [], face_shape=sparse.manifest.face_shape, max_batch=8)
    assert np.allclose(rival.run(faces[0][:5]).probabilities, 1 / 7)
    assert asked == [10, 10]


@pytest.mark.slow
def test_what_is_said_of_single_passes(sparse, call, tmp_path, monkeypatch):
    monkeypatch.chdir(sparse.path.parent)
    code, out, err = call("inspect", sparse.path.name)
    assert code == 0, err
    assert "3 (of 2 members x 4 views)" in out
    assert "2:identity" in out
    assert "30.8 %" in out
    assert max(map(len, out.splitlines())) <= 80
    code, _, err = call("cube", sparse.path, "-o", tmp_path / "x")
    assert code == 2
    assert "leaves passes out; a cube holds those of all members on all views" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--pass", "1:flip", "--member", "1"], "found --pass, and --member or --view; needed is one way"),
        (["--pass", "1"], "--pass 1: needed are a member's number and a view"),
        (["--pass", "x:flip"], "'x' is no number of a member"),
        (["--pass", "3:flip"], "there is no member 3; the run has 2"),
        (["--pass", "1:flop"], "'flop' is no view"),
        (["--pass", "1:flip", "--pass", "1:flip=2"], "names '1:flip' twice"),
        (["--pass", "1:flip=0"], "the weight is '0'"),
        (
            ["--pass", "1:flip", "--layout", "stacked"],
            "single passes stand in the layout branches; found --layout stacked",
        ),
    ],
)
def test_single_passes_that_make_no_sense(arguments, said, run_dir, call, tmp_path):
    code, _, err = call("build", run_dir, "-o", tmp_path / "x", *arguments)
    assert code == 2
    assert said in err
    assert list(tmp_path.iterdir()) == []


def test_stacked_members_leave_no_pass_out():
    member = torch.nn.Linear(1, 7)
    with pytest.raises(UsageError, match="stacked members see the same views"):
        Fold(torch.nn.Sequential(member), [VIEWS["flip"], VIEWS["zoom"]], Decision(), weights=np.array([[0.0, 1.0]]))


def test_a_view_that_no_member_sees_changes_nothing():
    """Whichever of the views it is; the others are told apart by their place."""
    rng = np.random.default_rng(0)
    members = [torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 7)).eval() for _ in range(2)]
    views = [VIEWS[name] for name in ("zoom", "flip", "gamma")]
    faces = rng.integers(0, 256, (5, 8, 8, 1), dtype=np.uint8)
    for unseen in range(3):
        weights = np.array([[1.0, 2.0, 0.5], [0.3, 1.0, 1.0]])
        weights[:, unseen] = 0
        wanted = Reference(members=members, views=views, decision=Decision(), weights=weights)
        with torch.inference_mode():
            found = Fold(members, views, Decision(), weights=weights)(torch.from_numpy(faces))
        assert np.allclose(found[0].numpy(), wanted.run(faces).probabilities, atol=1e-6)
        assert np.allclose(found[3].numpy(), wanted.scores(faces), atol=1e-6)


def test_all_passes_named_one_by_one_are_the_runs_own_vote():
    names = [f"{member}:{view}" for member in (1, 2) for view in ("flip", "zoom")]
    assert Choice(passes=dict.fromkeys(names, 0.5)).is_full_vote(2, ["zoom", "flip"])
    assert not Choice(passes=dict.fromkeys(names[:3], 0.5)).is_full_vote(2, ["zoom", "flip"])
    assert not Choice(passes=dict.fromkeys(names, 1.0) | {"1:flip": 2.0}).is_full_vote(2, ["zoom", "flip"])


@pytest.mark.slow
def test_mirrored_passes_are_told_from_others(sparse, bundle):
    assert certification._is_symmetric(bundle)
    assert not certification._is_symmetric(sparse)
    both = Choice(passes={"1:zoom": 1.0, "1:zoom-flipped": 1.0, "2:identity": 2.0, "2:flip": 2.0})
    views = {view.name: view for view in bundle.manifest.views}
    manifest = bundle.manifest.model_copy(
        update={"choice": both, "views": tuple(views[name] for name in ("zoom", "zoom-flipped", "identity", "flip"))}
    )
    assert certification._is_symmetric(Bundle(path=bundle.path, manifest=manifest))
