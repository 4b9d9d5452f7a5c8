"""The choice of passes at build, and the weighted bundle that comes of it, through the command line."""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from emoexport import cli, opening, sessions
from emoexport.bundle import Bundle
from emoexport.cube import Cube
from emoexport.decision import Decision
from emoexport.errors import UsageError
from emoexport.passes import Choice, pass_weights
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


def test_inspect_counts_the_passes_that_are_computed(built, bundle, call):
    code, out, err = call("inspect", built[0].path)
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
