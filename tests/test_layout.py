import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from rich.console import Console
from torch import nn

from emoexport import layout
from emoexport.bundle import Bundle
from emoexport.decision import Decision
from emoexport.errors import MissingRuntime, UsageError
from emoexport.fold import LAYOUTS, Fold
from emoexport.layout import export_in_layout
from emoexport.member_graph import trace
from emoexport.reference import Reference
from emoexport.views import views_named


@pytest.mark.slow
def test_a_stacked_bundle_passes_at_every_precision(run_dir, tmp_path, call):
    out = tmp_path / "stacked"
    code, said, _ = call(
        "build", run_dir, "-o", out, "--layout", "stacked", "--fp16", "--int8", "--keep-rejected", "--calib-size", 35
    )
    assert (code, "layout: stacked, asked for" in said) == (0, True)
    manifest = Bundle.open(out).manifest
    assert (manifest.layout.name, manifest.layout.reason) == ("stacked", "asked for")
    assert Bundle.open(out).build_command().endswith("--layout stacked --calib-size 35")
    assert set(manifest.rewrites) == {"idle", "batch-norm", "layer-scale", "normalisation", "layer-norm", "power"}
    code, said, _ = call("verify", out, "--limit", 70, "--rounds", 1, "--max-drop", 10, "--max-disagreement", 10)
    assert (code, "verdict: certified" in said) == (0, True), said
    code, said, _ = call("inspect", out, "--json")
    found = json.loads(said)
    assert (found["layout"]["name"], found["rewrites"]) == ("stacked", manifest.rewrites)
    graph = onnx.load(out / "model.int8.onnx").graph
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    stacked = [array for array in stored.values() if array.dtype == np.int8 and array.ndim == 3]
    assert stacked  # the batched products are quantised too, every output of every member over the whole range
    assert all((np.abs(array).max(axis=1) == 127).all() for array in stacked)


def laid_out(members, path, which, console=None):
    views = views_named(["identity", "flip"])
    return export_in_layout(
        [trace(member.eval(), (1, 8, 8)) for member in members],
        lambda module: Fold(module, views, Decision()),
        path / "model.onnx",
        layout=which,
        face_shape=(8, 8, 1),
        max_batch=4,
        console=console or Console(quiet=True),
    )


class Powered(nn.Module):
    """A member with constants made of its weights, which an exporter folds."""

    def __init__(self, width: int, power: float) -> None:
        super().__init__()
        self.layer, self.last = nn.Conv2d(1, width, 3), nn.Linear(36 * width, 7)
        self.power = nn.Parameter(torch.tensor(power))

    def forward(self, pictures):
        return self.last((self.layer(pictures).sigmoid() ** self.power.clamp(min=1)).flatten(1))


@pytest.mark.slow
@pytest.mark.parametrize("which", LAYOUTS)
def test_members_keep_their_own_weights_and_what_is_made_of_them(which, tmp_path, faces):
    torch.manual_seed(0)
    widths = (4, 5, 4, 5, 4) if which == "branches" else (4, 4, 4)
    members = [Powered(width, power).eval() for width, power in zip(widths, (1.5, 2.5, 3.5, 4.5, 5.5), strict=False)]
    laid_out(members, tmp_path, which)
    some = np.ascontiguousarray(faces[0][:4, :8, :8])
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(["scores"], {"faces": some})
    wanted = Reference(members=members, views=views_named(["identity", "flip"]), decision=Decision()).scores(some)
    assert np.abs(found - wanted).max() < 1e-6
    assert np.abs(found[:, :1] - found[:, 1:]).max() > 1e-2  # or no exchange of members could be seen
    nodes = onnx.load(tmp_path / "model.onnx").graph.node
    if which == "branches":
        layers = [node.name.split("/")[0].removesuffix(".layer") for node in nodes if node.op_type == "Conv"]
        assert sorted(layers) == [f"members.{number}" for number in range(5)]


def networks_of(*widths):
    return [nn.Sequential(nn.Conv2d(1, width, 3), nn.Flatten(), nn.Linear(36 * width, 7)) for width in widths]


@pytest.mark.slow
def test_auto_times_both_and_keeps_the_faster(tmp_path, monkeypatch):
    slow = {}

    def interleaved(calls, rounds, warmup):
        assert list(calls) == list(LAYOUTS)
        assert [call().label.shape for call in calls.values()] == [(1,), (1,)]
        return {name: np.full(rounds, slow.get(name, 5.0)) for name in calls}

    monkeypatch.setattr(layout, "interleave", interleaved)
    for other, wanted, nodes in (("branches", "stacked", 1), ("stacked", "branches", 3)):
        slow = {other: 10.0}
        folder = tmp_path / wanted
        folder.mkdir()
        chosen = laid_out(networks_of(4, 4, 4), folder, "auto")
        assert chosen.name == wanted
        assert chosen.median_ms == {wanted: 5.0, other: 10.0}
        assert "ONNX Runtime, FP32, one face a call, 20 rounds in turn" in chosen.reason
        assert [path.name for path in folder.iterdir()] == ["model.onnx"]
        graph = onnx.load(folder / "model.onnx").graph
        assert sum(node.op_type == "Conv" for node in graph.node) == nodes


def test_auto_measures_here(tmp_path):
    chosen = laid_out(networks_of(4, 4), tmp_path, "auto")
    assert chosen.name in LAYOUTS
    assert set(chosen.median_ms) == set(LAYOUTS)
    assert min(chosen.median_ms.values()) > 0


@pytest.mark.slow
def test_auto_without_a_choice(tmp_path, monkeypatch):
    chosen = laid_out(networks_of(4, 5), tmp_path, "auto")
    assert (chosen.name, chosen.reason) == ("branches", "the members differ in architecture")
    monkeypatch.setattr(layout, "backends_named", lambda _: [])
    with pytest.raises(MissingRuntime, match="no runtime is installed to time"):
        laid_out(networks_of(4, 4), tmp_path, "auto")


@pytest.mark.slow
def test_what_cannot_be_laid_out(tmp_path, run_dir, call):
    with pytest.raises(UsageError, match="differ in architecture: they cannot be stacked"):
        laid_out(networks_of(4, 5), tmp_path, "stacked")
    code, _, said = call("build", run_dir, "-o", tmp_path / "x", "--layout", "stack")
    assert (code, said) == (2, "error: 'stack' is no layout; known are branches, stacked and auto.\n")
    assert not (tmp_path / "x").exists()
