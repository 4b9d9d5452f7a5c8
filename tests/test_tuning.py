from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx_ir as ir
import pytest

from emoexport import tuning
from emoexport.bundle import Bundle
from emoexport.calib.sensitivity import Cost, block_of, cost_of
from emoexport.calib.tuning import Trial, Tuning
from emoexport.errors import CheckFailed
from emoexport.outcome import Outcome
from emoexport.pipeline import build
from emoexport.quantize import layers_of, to_int8_fp16
from emoexport.statistics import Estimate
from emoexport.trials import nodes_by_block

QUICK = ("--faces", 70, "--max-drop", 10, "--rounds", 2, "--batch", 4, "--engine", "onnxruntime")


@pytest.mark.parametrize(
    ("node", "block"),
    [
        ("members.0.backbone.layer1.0.conv2/conv2d_4", "backbone.layer1.0"),
        ("members.4.backbone.layer1.0.downsample.1/conv2d_5", "backbone.layer1.0"),
        ("members.stacked.backbone.stages_2.blocks.11.mlp.fc1/linear", "backbone.stages_2.blocks.11"),
        ("members.0.backbone.blocks.2.1.conv_pw/conv2d", "backbone.blocks.2.1"),
        ("members.0.calibration.gate/matmul/weight", "calibration.gate"),
        ("members.0.classifier.hidden1.0/matmul_1", "classifier.hidden1.0"),
        ("members.0/sub_132", ""),
        ("views/conv", ""),
    ],
)
def test_blocks_are_the_same_in_all_members(node, block):
    assert block_of(node) == block


def test_members_have_the_same_blocks_and_every_layer_stands_in_one(bundle):
    blocks = [{}, {}]
    for name, block in nodes_by_block(bundle.graph("fp32")).items():
        blocks[int(name.split(".")[1].split("/")[0])].setdefault(block, name)
    assert set(blocks[0]) == set(blocks[1])
    layers = layers_of(ir.load(bundle.graph("fp32")).graph)
    assert "" not in {block_of(layer.name) for layer in layers}


def said(probabilities: np.ndarray) -> Outcome:
    return Outcome(probabilities, probabilities.argmax(axis=1), probabilities.max(axis=1))


def test_what_a_change_costs():
    before = np.array([[0.7, 0.3], [0.6, 0.4], [0.2, 0.8]], np.float32)
    now = np.array([[0.7, 0.3], [0.4, 0.6], [0.6, 0.4]], np.float32)
    found = cost_of(said(before), said(now), np.array([0, 1, 1]))
    assert (found.changed, found.mended, found.broken) == (2, 1, 1)
    by_hand = (
        0.6 * np.log(0.6 / 0.4) + 0.4 * np.log(0.4 / 0.6) + 0.2 * np.log(0.2 / 0.6) + 0.8 * np.log(0.8 / 0.4)
    ) / 3
    assert found.kl == pytest.approx(by_hand, rel=1e-5)
    rounded = (before * np.float32(1 + 1e-6)).astype(np.float32)
    assert 0 <= cost_of(said(before), said(rounded), before.argmax(axis=1)).kl < 1e-12


class Scripted:
    """Trials of blocks whose gains and costs are told: a share of the time each, and faces that are broken."""

    def __init__(self, gains: dict[str, float], broken: dict[str, int], *, noise: float = 0.01) -> None:
        self.shop = SimpleNamespace(blocks=list(gains), precision="int8", faces=range(1000))
        self.backend, self.gains, self.broken, self.noise = None, gains, broken, noise
        self.steps: list[tuple[str, ...]] = []

    def _trial(self, kind: str, left: list[str]) -> Trial:
        speed = 1.0
        for block in left:
            speed *= 1 - self.gains[block]
        broken = sum(count for block, count in self.broken.items() if block not in left)
        return Trial(
            kind=kind,
            precision="int8",
            left=tuple(left),
            cost=Cost(changed=broken, mended=0, broken=broken, kl=broken / 1000),
            times_as_fast=Estimate(value=speed, low=speed - self.noise, high=speed + self.noise),
            ms_a_face=1.0,
        )

    def alone(self, block, *_):
        return self._trial("alone", [name for name in self.gains if name != block])

    def without(self, block):
        return self._trial("without", [block])

    def together(self, left):
        self.steps.append(tuple(block for block in self.gains if block in left))
        return self._trial("search", list(self.steps[-1]))


def test_blocks_that_gain_no_time_go_back_to_fp32():
    trials = Scripted({"a": 0.2, "b": 0.001, "c": 0.3, "d": -0.02}, {})
    assert tuning._search(trials, 0.01)[-1].left == ("b", "d")
    assert trials.steps == [(), ("b", "d")]


def test_where_they_gain_together_they_are_tried_one_by_one():
    trials = Scripted({"a": 0.2, "b": 0.009, "c": 0.009, "d": 0.009}, {})
    steps = tuning._search(trials, 0.01)
    assert trials.steps == [(), ("b", "c", "d"), ("b",), ("b", "c"), ("b", "d")]
    assert steps[-1].left == ("b",)
    assert sorted(step.left for step in steps) == sorted(trials.steps)


def test_a_step_is_made_once():
    trials = Scripted({"a": 0.2, "b": 0.008, "c": 0.009}, {})
    assert tuning._search(trials, 0.01)[-1].left == ("b",)
    assert trials.steps == [(), ("b", "c"), ("b",)]


def test_what_a_wide_interval_does_not_rule_out_is_not_as_fast():
    trials = Scripted({"a": 0.2, "b": 0.03, "c": 0.3}, {}, noise=0.05)
    assert tuning._search(trials, 0.01)[-1].left == ()


def test_those_that_cost_most_for_the_time_they_gain_go_back_until_little_is_lost():
    trials = Scripted({"a": 0.4, "b": 0.1, "c": 0.1, "d": 0.3}, {"a": 2, "b": 6, "c": 0, "d": 1})
    chosen = tuning._search(trials, 0.01)[-1]
    assert chosen.left == ("b",)  # 6 faces for a tenth of the time; a costs more, and gains four times as much
    assert -0.01 < tuning._bound(trials, chosen) < -0.003
    stricter = tuning._search(trials, 0.006)[-1]
    assert stricter.left == ("a", "b")
    assert tuning._bound(trials, stricter) >= -0.006


def test_where_no_block_is_good_enough_the_search_says_so():
    with pytest.raises(CheckFailed, match="no block can have INT8 without losing more than 1 points"):
        tuning._search(Scripted({"a": 0.4, "b": 0.1}, {"a": 50, "b": 60}), 0.01)


@pytest.fixture(scope="module")
def tuned(bundle, tmp_path_factory, quiet) -> tuple[Path, Tuning]:
    out = tmp_path_factory.mktemp("tuning") / "x"
    settings = {"faces": 70, "max_drop": 0.1, "rounds": 2, "batch": 4, "engine": "onnxruntime"}
    return out, tuning.tune(bundle, out, **settings, console=quiet)


@pytest.mark.slow
def test_every_block_is_tried(tuned, bundle):
    out, found = tuned
    assert Tuning.parse_json(out / "tuning.json") == found
    assert found.is_intact()
    assert len(found.blocks) > 4
    for block in found.blocks:
        rest = tuple(name for name in found.blocks if name != block)
        alone = {trial.precision: trial for trial in found.trials if trial.kind == "alone" and trial.left == rest}
        assert set(alone) == {"int8", "fp16"}
        assert alone["int8"].cost.kl > alone["fp16"].cost.kl > 0
        assert [trial.times_as_fast for trial in found.trials if trial.left == (block,) and trial.kind == "without"]
    whole = next(trial for trial in found.trials if trial.kind == "search" and not trial.left)
    assert found.trials[-1].left == found.left
    assert whole.cost.kl > max(trial.cost.kl for trial in found.trials if trial.precision == "fp16")
    assert found.shared_with_gate == 70  # the run has 210 validation faces, and all of them judge


@pytest.mark.slow
def test_trials_go_on_after_a_kill(tuned, bundle, call, tmp_path, monkeypatch):
    log = (tuned[0] / "trials.jsonl").read_text().splitlines(keepends=True)
    out = tmp_path / "x"
    out.mkdir()
    (out / "trials.jsonl").write_text("".join(log[:-2]) + log[-2][:30])
    # The engine need not be named again: another one might be the fastest today.
    monkeypatch.setattr(tuning, "fastest", lambda *_: pytest.fail("the engine was chosen anew"))
    code, said, _ = call("tune", bundle.path, *QUICK[:-2], "-o", out)
    assert code == 0
    assert f"going on after {len(log) - 3} trials" in said
    assert said.count(" alone in ") == 0
    assert "blocks in int8, timed" in said
    assert (out / "trials.jsonl").read_text().startswith("".join(log[:-2]))
    assert (out / "tuning.png").read_bytes().startswith(b"\x89PNG")
    assert "| block | int8 KL |" in (out / "tuning.md").read_text()
    assert f"--tuning {out / 'tuning.json'}" in said
    code, _, error = call("tune", bundle.path, *QUICK, "--batch", 8, "-o", out)
    assert (code, "were made with another batch: 4; now it is 8" in error) == (2, True)
    assert "--force" in error
    code, _, error = call("tune", bundle.path, *QUICK, "-o", bundle.path)
    assert (code, "there is no trials.jsonl in it" in error) == (2, True)


@pytest.mark.slow
def test_build_leaves_out_what_was_chosen(tuned, bundle, run_dir, tmp_path, quiet, call, int8_is_slower):
    out, found = tuned
    chosen = found.model_copy(update={"left": found.blocks[:2]}).sealed()
    file = tmp_path / "chosen.json"
    file.write_text(chosen.to_json())
    options = ("--int8", "--calib-size", 35, "--keep-rejected", "--max-batch", 64)
    with int8_is_slower():
        code, _, error = call("build", run_dir, "-o", tmp_path / "b", *options, "--tuning", file)
    assert (code, error) == (0, "")
    built = Bundle.open(tmp_path / "b")
    left = built.manifest.graphs["int8"].kept["left out"]
    assert {block_of(name) for name in left} == set(found.blocks[:2])
    assert len(left) < built.manifest.graphs["int8"].operators["DequantizeLinear"]
    again = f"--keep-rejected --max-batch 64 --tuning {tmp_path / 'b' / 'tuning.json'} --calib-size 35"
    assert built.build_command().endswith(again)
    before, after = (ir.load(it.graph("int8")).graph for it in (bundle, built))
    count = [sum(node.op_type == "DequantizeLinear" for node in graph) for graph in (before, after)]
    assert count[1] < count[0]
    # A tuning of another fold, one that was edited, and one of what is not built.
    code, _, error = call("build", run_dir, "-o", tmp_path / "c", *options, "--view", "identity", "--tuning", file)
    assert (code, "the tuning is of another fold" in error) == (4, True)
    file.write_text(chosen.to_json().replace(f'"{found.blocks[1]}"', '"another"', 1))
    code, _, error = call("build", run_dir, "-o", tmp_path / "c", *options, "--tuning", file)
    assert (code, "was changed after it was written" in error) == (4, True)
    code, _, error = call("build", run_dir, "-o", tmp_path / "c", "--tuning", out / "tuning.json")
    assert (code, "a tuning of int8, which is not asked for" in error) == (2, True)
    assert not (tmp_path / "c").exists()


@pytest.mark.slow
def test_a_bundle_without_ranges_cannot_be_tuned(run_dir, tmp_path, quiet, call):
    build(run_dir, tmp_path / "b", console=quiet)
    code, _, error = call("tune", tmp_path / "b", "-o", tmp_path / "x")
    assert (code, "has no calibration; needed is one for int8" in error) == (4, True)
    assert "--int8" in error


def test_blocks_that_are_left_out_stay_in_fp32_in_a_mixed_graph_too(bundle, tmp_path, faces, calibrated):
    source, target = bundle.graph("fp32"), tmp_path / "model.onnx"
    nodes = nodes_by_block(source)
    block = next(name for name in nodes.values() if ".blocks." in name)
    left = {name for name, its in nodes.items() if its == block}
    to_int8_fp16(source, target, calibrated(source, faces[0][:40]), left)
    found = {node.name: node for node in ir.load(target).graph if node.name in left}
    assert set(found) == left
    types = {value.dtype for node in found.values() for value in (*node.inputs, *node.outputs) if value is not None}
    assert ir.DataType.FLOAT in types
    assert not types & {ir.DataType.FLOAT16, ir.DataType.INT8}
