"""`emoexport plan` and `emoexport build --plan`, and the arithmetic behind them."""

import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.special import softmax

from emoexport import planning
from emoexport.bundle import Bundle
from emoexport.comparison import Comparison
from emoexport.decision import Decision
from emoexport.errors import BadCheckpoint, BadInput, MissingRuntime, UsageError
from emoexport.passes import Choice
from emoexport.plan import Candidate, Goals, Plan
from emoexport.plan_costs import Costs, Setting, call_samples
from emoexport.plan_search import best_member_of, candidates_of, is_likely_to_hold, likeliest
from emoexport.sessions import run_of


def drawn_cube(faces: int = 1500, seed: int = 0) -> SimpleNamespace:
    """A score cube of correlated passes: what the face shows, what a member gets wrong, what a view adds."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 7, faces)
    shown = 2.0 * np.eye(7)[labels] + rng.normal(size=(faces, 7))
    of_members, of_views = rng.normal(size=(faces, 3, 1, 7)), rng.normal(size=(faces, 1, 8, 7))
    scores = softmax(
        shown[:, None, None] + 0.4 * of_members + 0.4 * of_views + 0.3 * rng.normal(size=(faces, 3, 8, 7)), axis=-1
    ).astype(np.float32)
    weights = np.full((3, 8), 1 / 24)

    def vote(weights: np.ndarray = weights) -> np.ndarray:
        return np.einsum("nkvl,kv->nl", scores.astype(np.float64), weights / weights.sum())

    record = SimpleNamespace(shape=scores.shape, views=tuple(f"view-{number}" for number in range(8)))
    return SimpleNamespace(scores=scores, labels=labels, weights=weights, vote=vote, record=record)


@pytest.fixture(scope="module")
def cube() -> SimpleNamespace:
    return drawn_cube()


def test_more_passes_agree_more_and_are_those_that_predict_the_vote(cube):
    found = candidates_of(cube, Decision(), [4, 7, 9])
    assert [one.passes for one in found] == [1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 16, 20]
    differ = [one.selection.disagreement_pct.value for one in found]
    assert differ[0] > 3 * differ[6] > 3 * differ[-1]
    third = found[2].choice.passes
    members, views = zip(*(name.split(":") for name in third), strict=True)
    assert set(members) == {"4", "7", "9"}  # errors of members and views are independent: none is taken twice
    assert len(set(views)) == 3
    assert sum(third.values()) == pytest.approx(1, abs=1e-5)
    number = [4, 7, 9].index(int(members[0])), int(views[0].removeprefix("view-"))
    alone = cube.scores[:, number[0], number[1]].argmax(axis=-1)
    first = found[0].selection
    assert first.accuracy == pytest.approx((alone == cube.labels).mean(), abs=1e-6)
    full = cube.vote().argmax(axis=1)
    assert first.disagreement_pct.value == pytest.approx(100 * (alone != full).mean(), abs=1e-3)


def test_the_best_member_is_the_one_that_is_right_most_often():
    cube = drawn_cube(300, seed=3)
    cube.scores[:, 1, 0] = np.eye(7)[cube.labels]
    assert best_member_of(cube, Decision()).accuracy == 1


def test_passes_of_a_soup_are_held_against_the_vote_of_the_members(cube):
    vote = np.zeros(len(cube.labels), dtype=np.int64)
    found = candidates_of(cube, Decision(), [1, 2, 3], sizes=(1, 24), vote=vote, soup=("uniform", "0" * 64))
    assert [one.passes for one in found] == [1, 24]
    assert found[1].soup == "uniform"
    label = cube.vote().argmax(axis=1)
    assert found[1].selection.disagreements == (label != 0).sum()


def test_labels_are_not_looked_at_by_the_choice(cube):
    other = SimpleNamespace(**{**vars(cube), "labels": np.roll(cube.labels, 1)})
    found, again = (candidates_of(one, Decision(), [1, 2, 3]) for one in (cube, other))
    assert [one.choice for one in found] == [one.choice for one in again]
    assert found[0].selection.accuracy != again[0].selection.accuracy


def comparison(faces: int, gained: int, lost: int, differ: int) -> Comparison:
    full = np.zeros(faces, dtype=np.int64)
    few, truth = full.copy(), full.copy()
    few[:gained] = truth[:gained] = 1
    few[gained : gained + lost] = 2
    few[gained + lost : differ] = truth[gained + lost : differ] = 3
    few[gained + lost : differ] = 4
    return Comparison.of(few, full, truth)


def test_a_comparison_counts_what_differs():
    found = comparison(1000, 7, 9, 20)
    assert (found.only_right, found.only_wrong) == (7, 9)
    assert found.gain_points.value == pytest.approx(-0.2)
    assert found.bound_points < -0.2
    assert found.disagreement_pct.value == pytest.approx(2.0)
    assert found.disagreement_bound_pct > 2.0


def test_how_likely_a_choice_is_to_hold_is_as_simulated():
    """Of choices at the edge of what is called likely, about four of five are shown to hold on faces like these."""
    rng, faces, goals = np.random.default_rng(0), 3000, Goals(max_drop_points=0.5)
    lost = max(
        count for count in range(200) if is_likely_to_hold(comparison(faces, count, count, 2 * count), goals, faces)
    )
    share = lost / faces
    held = 0
    for _ in range(400):
        gained, broken = rng.binomial(faces, share, 2)
        held += comparison(faces, gained, broken, gained + broken).bound_points >= -0.5
    assert 0.72 <= held / 400 <= 0.88
    strict = Goals(max_drop_points=100, max_disagreement_pct=1.0)
    assert is_likely_to_hold(comparison(faces, 5, 5, 15), strict, faces)
    assert not is_likely_to_hold(comparison(faces, 5, 5, 28), strict, faces)


def test_the_fewest_passes_that_are_likely_to_hold_are_taken_if_they_are_fast_enough():
    candidates = [
        Candidate(
            choice=Choice(passes={f"1:v{n}": 1.0 for n in range(count)}),
            selection=comparison(2000, lost, lost, 2 * lost),
        )
        for count, lost in ((1, 90), (2, 40), (4, 6), (8, 2))
    ]
    goals = Goals(max_drop_points=0.5)
    costs = Costs({Setting("a-fp32", 1): (0.0, 1.0), Setting("a-fp32", 16): (8.0, 2.0)})

    def found(**other: float) -> tuple[int | None, str]:
        asked = goals.model_copy(update=other)
        return likeliest(candidates, asked, 2000, lambda passes: costs.why_slow(passes, asked))

    assert found() == found(max_latency_ms=4.0) == (2, "")
    for other, said in (
        ({"max_drop_points": 0.01}, "no number of passes is likely to be shown within the limits on 2,000 faces"),
        ({"max_passes": 3}, "4 passes are needed for the limits; allowed are 3"),
        (
            {"max_latency_ms": 3.5},
            "4 passes are needed for the limits, and a-fp32 would take 16 ms for 16 faces, 1e+03 a second; asked for "
            "are 3.5 ms",
        ),
    ):
        assert found(**other) == (None, said)


def test_the_engine_and_batch_that_take_least_a_face_within_the_goals():
    small, large = Setting("a-fp32", 1), Setting("a-int8", 16)
    samples = {
        (small, "full"): np.full(5, 82.0),
        (small, "one"): np.full(5, 3.0),
        (large, "full"): np.full(5, 420.0),
        (large, "one"): np.full(5, 25.0),
    }
    costs = Costs.of(samples, 80, 1)
    assert costs.milliseconds(small, 1) == pytest.approx(3.0)
    assert costs.milliseconds(large, 80) == pytest.approx(420.0)
    assert costs.milliseconds(small, 2) == pytest.approx(4.0)
    assert costs.fastest(1, Goals()) == large
    assert costs.fastest(1, Goals(max_latency_ms=20)) == small
    assert costs.fastest(1, Goals(max_latency_ms=20, min_throughput=500)) is None
    assert costs.fastest(1, Goals(min_throughput=500)) == large
    assert costs.why_slow(1, Goals(min_throughput=500)) == ""
    assert "asked for are 20 ms and 500 faces a second" in costs.why_slow(
        1, Goals(max_latency_ms=20, min_throughput=500)
    )


def test_calls_are_timed_on_other_faces_each_time():
    seen: list[int] = []
    engine = SimpleNamespace(run=lambda faces: seen.append(int(faces[0, 0, 0, 0])))
    faces = np.arange(6, dtype=np.uint8)[:, None, None, None]
    found = call_samples({(Setting("a", 2), "full"): engine}, faces, rounds=5, progress=lambda _: None)
    assert len(set(seen)) == 3  # three calls of two faces, drawn in an order that is kept
    assert seen[:3] == seen[3:6]
    assert found[Setting("a", 2), "full"].shape == (5,)


def final_of(**samples: list[float]) -> planning._Final:
    arrays = {name: np.array(times) for name, times in samples.items()}
    return planning._Final(Setting("a", 10), {}, arrays, (), None, None)


def test_the_final_is_won_by_what_takes_least_where_its_slow_calls_are_within_the_goals():
    final = final_of(full=[50.0] * 50, passes=[10.0] * 50, cascade=[5.0] * 45 + [30.0] * 5)
    assert final.winner(Goals()) == "cascade"
    assert final.winner(Goals(max_latency_ms=20)) == "passes"
    assert final.winner(Goals(max_latency_ms=9)) is None
    assert final.winner(Goals(min_throughput=1200)) == "cascade"
    assert final.winner(Goals(min_throughput=1500)) is None
    assert final_of(full=[50.0] * 5).winner(Goals()) is None
    assert final_of(full=[50.0] * 5, passes=[51.0] * 5).winner(Goals()) is None


@pytest.mark.parametrize(
    ("gained", "lost", "differ", "goals", "verdict"),
    [
        (2, 2, 6, {}, "certified"),
        (0, 12, 20, {}, "not enough evidence"),
        (0, 60, 70, {}, "failed"),
        (2, 2, 30, {"max_disagreement_pct": 1.0}, "not enough evidence"),
        (2, 2, 90, {"max_disagreement_pct": 1.0}, "failed"),
    ],
)
def test_verdicts_are_passed_by_bounds(gained, lost, differ, goals, verdict):
    found, reasons = planning._judged(comparison(3000, gained, lost, differ), Goals(**goals))
    assert found == verdict
    assert bool(reasons) == (verdict != "certified")


@pytest.fixture(scope="module")
def made(bundle, run_dir, tmp_path_factory) -> tuple[Path, Plan]:
    """A plan of the tiny bundle, with one engine and wide limits."""
    folder = tmp_path_factory.mktemp("plan")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        from rich.console import Console

        plan = planning.make_plan(
            bundle,
            folder / "tiny",
            Goals(max_drop_points=20),
            planning.Wishes(engines=["onnxruntime"], precisions=["fp32"], rounds=5, exits=False),
            console=Console(quiet=True),
        )
    return folder / "tiny", plan


@pytest.mark.slow
def test_a_plan_is_made_confirmed_and_written(made):
    folder, plan = made
    assert Plan.parse_json(folder / "plan.json") == plan
    assert plan.is_intact()
    assert sorted(path.name for path in folder.iterdir()) == ["plan.json", "plan.md", "plan.png"]
    assert plan.verdict == "certified"
    assert plan.chosen is not None
    assert (plan.engine, plan.precision) == ("onnxruntime", "fp32")
    passes = plan.candidates[plan.chosen].passes
    fast = {one.passes: one for one in plan.timings}
    assert set(fast) == {1, passes, 32}
    assert fast[passes].times_full.value > 1.5
    text = (folder / "plan.md").read_text()
    assert "verdict: certified" in text
    assert f"{passes} pass" in text
    assert " by onnxruntime-fp32: " in text
    assert "Soups" in plan.notes[0] or "soup" in plan.notes[0]
    assert plan.winner == "passes"
    assert (folder / "plan.png").read_bytes()[:4] == b"\x89PNG"
    assert plan.confirmation.faces == 210
    assert plan.shrinkage_points == pytest.approx(
        plan.candidates[plan.chosen].selection.gain_points.value - plan.confirmation.gain_points.value, abs=1e-3
    )


@pytest.mark.slow
def test_a_plan_is_built(made, run_dir, call, tmp_path):
    folder, plan = made
    code, out, err = call("build", run_dir, "-o", tmp_path / "x", "--plan", folder / "plan.json", "--max-batch", 64)
    assert code == 0, out + err
    manifest = Bundle.open(tmp_path / "x").manifest
    assert manifest.choice == plan.choice
    assert list(manifest.graphs) == ["fp32"]
    assert manifest.passes_a_face == plan.candidates[plan.chosen].passes


def test_a_plan_replaces_no_bundle_of_the_full_vote(call, run_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    built: list[Path] = []

    def build(run: Path, out: Path, **_: object) -> None:
        built.append(out)
        raise BadInput("enough")

    monkeypatch.setattr("emoexport.pipeline.build", build)
    monkeypatch.setattr(planning, "cascade_of_plan", lambda _: None)
    monkeypatch.setattr(planning, "planned", lambda *_: (run_dir, Choice(passes={"1:flip": 1.0}), "fp32"))
    call("build", run_dir)
    call("build", run_dir, "--plan", "plan.json")
    assert built == [Path("build/tiny"), Path("build/tiny-few")]


@pytest.mark.slow
def test_plans_that_cannot_be_built_are_told(made, run_dir, call, tmp_path):
    folder, plan = made
    code, _, err = call("build", run_dir, "-o", tmp_path / "x", "--plan", folder / "plan.json", "--view", "flip")
    assert code == 2
    assert "found --plan, and passes besides it" in err
    changed = tmp_path / "changed.json"
    changed.write_text((folder / "plan.json").read_text().replace('"batch": 16', '"batch": 17'))
    none = tmp_path / "none.json"
    update = {"chosen": None, "winner": None, "engine": None, "precision": None, "confirmation": None}
    update["reasons"] = ("too few",)
    none.write_text(plan.model_copy(update=update).sealed().to_json())
    others = tmp_path / "others.json"
    others.write_text(plan.model_copy(update={"members": dict.fromkeys(plan.members, "0" * 64)}).sealed().to_json())
    for file, said in (
        (changed, "was changed after it was written"),
        (none, "chose nothing: too few"),
        (others, "is a plan for other members than those in"),
        (tmp_path / "missing.json", "cannot be read"),
    ):
        with pytest.raises(BadInput, match=said):
            planning.planned(file, run_dir)


@pytest.mark.slow
def test_the_command_says_what_it_found_and_what_comes_next(made, bundle, call, monkeypatch):
    folder, plan = made
    monkeypatch.setattr(planning, "make_plan", lambda *_, **__: plan)
    code, out, err = call("plan", bundle.path, "-o", folder)
    assert code == 0, err
    assert "verdict: certified" in out
    run = os.path.relpath(bundle.run())  # any other run, such as the newest, would be refused
    assert f"next: emoexport build {run} --plan {folder}/plan.json" in out
    none = plan.model_copy(
        update={
            "chosen": None,
            "winner": None,
            "confirmation": None,
            "verdict": "not enough evidence",
            "reasons": ("too few faces",),
        }
    )
    monkeypatch.setattr(planning, "make_plan", lambda *_, **__: none)
    code, out, _ = call("plan", bundle.path, "-o", folder)
    assert code == 6
    assert "verdict: not enough evidence: too few faces." in out
    assert "next:" not in out


def test_what_a_plan_refuses(bundle, call, tmp_path):
    code, _, err = call("plan", bundle.path, "--batch", "65", "-o", tmp_path / "x")
    assert code == 2
    assert "found --batch 65;" in err


def test_engines_that_are_made_of_no_graph_take_no_part(bundle, quiet):
    engines = [
        SimpleNamespace(backend=name, precision="fp32", name=f"{name}-fp32") for name in ("onnxruntime", "inductor")
    ]
    assert planning._eligible(bundle, engines, quiet) == engines[:1]
    with pytest.raises(MissingRuntime, match="engines of graphs, and none is here"):
        planning._eligible(bundle, engines[1:], quiet)


@pytest.mark.slow
def test_a_cascade_that_wins_is_certified_and_becomes_part_of_the_bundle(bundle, run_dir, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(bundle.path, tmp_path / "build" / "tiny")
    monkeypatch.setattr(planning._Final, "winner", lambda *_: "cascade")
    common = ("--run", run_dir, "--engine", "onnxruntime", "--precision", "fp32", "--rounds", 5, "--no-soups")
    code, out, err = call("plan", "build/tiny", "--max-drop", 20, *common)
    plan = Plan.parse_json(tmp_path / "plans" / "tiny" / "plan.json")
    assert plan.is_intact()
    assert plan.winner == "cascade"
    assert plan.choice is None
    assert plan.cascade is not None
    assert (code, plan.verdict) == (0, "certified"), err
    assert plan.confirmation == plan.cascade.shown
    assert plan.exits.faces == 210
    assert plan.cascade.sentences[0] in out
    assert f"--cascade {plan.cascade.engine}" in out
    assert (tmp_path / "build" / "tiny" / "cascades" / plan.cascade.engine / "cascade.json").is_file()
    file = tmp_path / "plans" / "tiny" / "plan.json"
    with pytest.raises(BadInput, match=r"chose a cascade, which is part of .*build/tiny already"):
        planning.planned(file, run_dir)
    code, out, err = call("build", run_dir, "--plan", file)
    assert code == 0, err
    assert "part of build/tiny already: nothing is left to build" in out
    assert f"--bundle build/tiny --cascade {plan.cascade.engine}" in out
    (tmp_path / "build" / "tiny" / "cascades" / plan.cascade.engine / "member-1.onnx").unlink()
    code, _, err = call("build", run_dir, "--plan", file)
    assert code == 4
    assert "member-1.onnx is missing" in err
    assert "Where the faces leave" in (tmp_path / "plans" / "tiny" / "plan.md").read_text()


def test_a_run_in_the_place_of_a_bundle_is_built_first(run_dir, bundle, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    built: list[Path] = []

    def build(run: Path, out: Path, **settings: object) -> Bundle:
        built.append(out)
        assert settings["precisions"] == ["int8"]
        return bundle

    monkeypatch.setattr("emoexport.pipeline.build", build)
    monkeypatch.setattr(planning, "make_plan", lambda *_, **__: (_ for _ in ()).throw(BadInput("enough")))
    assert call("plan", run_dir, "--precision", "int8")[0] == 4
    assert built == [Path("build/tiny")]
    shutil.copytree(bundle.path, tmp_path / "build" / "tiny")
    code, _, err = call("plan", run_dir)
    assert code == 2
    assert "is the bundle of another run than" in err


def test_compilers_build_engines_of_few_passes_for_the_batches_that_are_timed(monkeypatch):
    asked: list[tuple] = []
    monkeypatch.setattr(planning, "build_engines", lambda *given, **_: asked.append(given[1:]))
    engines = {
        name: SimpleNamespace(backend=name.rpartition("-")[0], precision="int8")
        for name in ("tensorrt-int8", "onnxruntime-cuda-int8")
    }
    planner = SimpleNamespace(wishes=planning.Wishes(batches=(64, 1)), console=None)
    planning._Planner._compile(planner, "bundle", list(engines.values()))
    ((backends, precisions, settings),) = asked
    assert [one.name for one in backends] == ["tensorrt"]
    assert precisions == ["int8"]
    assert (settings.opt_batch, settings.max_batch) == ((1, 64), 64)


def test_a_plan_is_not_confirmed_on_the_faces_that_chose(bundle, quiet, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wishes = planning.Wishes(split="validation", engines=["onnxruntime"], precisions=["fp32"])
    with pytest.raises(UsageError, match="are those that chose; needed are others"):
        planning.make_plan(bundle, tmp_path / "x", Goals(), wishes, console=quiet)


def test_where_there_can_be_no_cascade_a_plan_says_so(bundle, quiet, tmp_path):
    def prepared(**goals: float) -> tuple[object, list[str]]:
        planner = planning._Planner(
            bundle,
            Goals(**goals),
            planning.Wishes(engines=["onnxruntime"], precisions=["fp32"]),
            tmp_path,
            quiet,
        )
        return planner._prepared(Setting("onnxruntime-fp32", 16), None), planner.notes

    assert prepared(max_drop_points=0) == (
        None,
        ["Cascades were not tried: found a limit of 0; a cascade is certified for more than 0 and less than 100."],
    )
    assert prepared(max_passes=3) == (None, [])


def test_a_run_whose_members_are_others_is_refused(bundle, run_dir, tmp_path):
    shutil.copytree(run_dir, tmp_path / "run")
    name = next((tmp_path / "run" / "members").glob("*.json"))
    name.write_text(re.sub(r'"sha256": "[0-9a-f]{64}"', f'"sha256": "{"0" * 64}"', name.read_text()))
    with pytest.raises(BadCheckpoint, match="are not those that"):
        run_of(bundle, tmp_path / "run")
