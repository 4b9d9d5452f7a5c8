import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from rich.console import Console

from emoexport import opening
from emoexport.bundle import Bundle
from emoexport.errors import BadBundle
from emoexport.files import sha256_of
from emoexport.flops import gflop_a_pass, parameters_of
from emoexport.onnx_graph import OPSET
from emoexport.precision import PRECISIONS
from emoexport.quantize import layers_of
from emoexport.summary import LAYERS, BundleSummary, summarize
from emoexport.summary_tables import summary_tables
from emoexport.train.checkpoint import load_members


@pytest.fixture(scope="module")
def summary(bundle) -> BundleSummary:
    return summarize(bundle)


def rewritten(bundle: Bundle, path: Path, **changes: object) -> Path:
    """A copy of a bundle whose manifest says `changes`, and is sealed again."""
    copy = Path(shutil.copytree(bundle.path, path))
    forged = bundle.manifest.model_copy(update=changes).sealed()
    (copy / "manifest.json").write_text(forged.to_json())
    return copy


def test_the_cost_of_a_face_is_that_of_the_members_on_every_view(summary, run_dir):
    _, members = load_members(run_dir)
    assert summary.passes_a_face == len(members) * 16
    assert summary.parameters == sum(parameters_of(member) for member in members)
    gflop = sum(gflop_a_pass(member, (1, 32, 32)) for member in members)
    assert summary.gflop_a_face == pytest.approx(16 * gflop)
    assert [member.parameters for member in summary.members] == [parameters_of(member) for member in members]


def test_bytes_are_those_that_an_engine_takes_and_gives(summary, bundle, faces):
    some = faces[0][:4]
    assert summary.bytes_in_a_face * len(some) == some.nbytes
    for engine in opening.open_engines(bundle, engines=["onnxruntime"]):
        outcome, scores = engine.run(some), engine.scores(some)
        found = {name: np.asarray(value).nbytes // len(some) for name, value in outcome._asdict().items()}
        assert summary.bytes_out_a_face == {**found, "scores": scores.nbytes // len(some)}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_weights_are_counted_as_they_lie_in_the_file(precision, summary, bundle):
    graph = summary.graphs[precision]
    stored = ir.load(bundle.graph(precision)).graph.initializers.values()
    assert sum(count.weights for count in graph.types.values()) == sum(value.const_value.size for value in stored)
    assert sum(count.weight_bytes for count in graph.types.values()) == sum(
        value.const_value.nbytes for value in stored
    )
    assert graph.bytes == bundle.size_of(precision)
    assert graph.bytes > sum(count.weight_bytes for count in graph.types.values())
    assert graph.opset == (22 if precision == "bf16" else OPSET)
    assert graph.operators == bundle.manifest.graphs[precision].operators


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_node_is_counted_once(precision, summary):
    graph = summary.graphs[precision]
    layers = sum(count for name, count in graph.operators.items() if name in LAYERS)
    assert sum(count.layers for count in graph.types.values()) == layers
    assert sum(count.other_nodes for count in graph.types.values()) == sum(graph.operators.values()) - layers
    assert "UNDEFINED" not in graph.types


def test_layers_compute_in_the_precision_of_their_graph(summary, bundle):
    layers = {
        precision: {name: count.layers for name, count in graph.types.items() if count.layers}
        for precision, graph in summary.graphs.items()
    }
    total = sum(layers["fp32"].values())
    quantized = len(layers_of(ir.load(bundle.graph("fp32")).graph))
    assert layers == {
        "fp32": {"FLOAT": total},
        "fp16": {"FLOAT16": total},
        "bf16": {"BFLOAT16": total},
        "int8": {"INT8": quantized, "FLOAT": total - quantized},
        "int8-fp16": {"INT8": quantized, "FLOAT16": total - quantized},
        "fp8": {"FLOAT8E4M3FN": quantized, "FLOAT16": total - quantized},
    }
    assert 0 < quantized < total


def test_what_stays_in_fp32_shows(summary):
    """In the FP16 graph views, vote and decision; in the INT8 graph the norms and the depthwise layers too."""
    half, whole = summary.graphs["fp16"].types["FLOAT16"], summary.graphs["fp16"].types["FLOAT"]
    assert half.other_nodes >= summary.graphs["fp16"].operators["LayerNormalization"]
    assert whole.other_nodes > 0
    assert summary.graphs["int8"].types["INT8"].weights > summary.graphs["int8"].types["FLOAT"].weights


def test_weights_beside_the_graph_are_counted_unread(bundle, tmp_path, summary):
    copy = Path(shutil.copytree(bundle.path, tmp_path / "copy"))
    graph = copy / "model.fp32.onnx"
    model = onnx.load(graph)
    graph.unlink()
    onnx.save(model, graph, save_as_external_data=True, location=f"{graph.name}.data", size_threshold=0)
    (copy / f"{graph.name}.data").unlink()
    found = summarize(Bundle(path=copy, manifest=bundle.manifest)).graphs["fp32"]
    assert found.types == summary.graphs["fp32"].types


def test_a_bundle_from_before_there_were_costs_and_weights_opens(bundle, tmp_path):
    copy = Path(shutil.copytree(bundle.path, tmp_path / "old"))
    text = json.loads((copy / "manifest.json").read_text())
    for member in text["members"]:
        del member["parameters"], member["gflop_a_pass"], member["weight"]
    for view in text["views"]:
        del view["weight"], view["same_as"]
    del text["choice"]
    (copy / "manifest.json").write_text(json.dumps(text))
    with pytest.raises(BadBundle, match="changed after it was written"):
        Bundle.open(copy)
    old = bundle.manifest.parse(text, source="test")
    (copy / "manifest.json").write_text(json.dumps({**text, "digest": old._digest()}))
    found = summarize(Bundle.open(copy))
    assert (found.parameters, found.gflop_a_face) == (None, None)
    assert "not counted" in shown(found)


def shown(summary: BundleSummary) -> str:
    console = Console(width=80)
    with console.capture() as captured:
        for title, table in summary_tables(summary):
            console.print(title)
            console.print(table)
    return captured.get()


def test_the_tables_fit_a_terminal(summary):
    text = shown(summary)
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text  # nothing was cut
    for word in (
        "shift-right-flipped",
        "LayerNormalization",
        "FLOAT16",
        "32 (2 members x 16 views)",
        "model.int8.onnx",
    ):
        assert word in text


def test_a_graph_that_is_no_onnx(bundle, tmp_path):
    copy = Path(shutil.copytree(bundle.path, tmp_path / "copy"))
    for garbage, said in ((b"not a graph", "cannot be read as ONNX"), (b"", "it has no outputs")):
        (copy / "model.fp16.onnx").write_bytes(garbage)
        entry = bundle.manifest.files["model.fp16.onnx"].model_copy(
            update={"sha256": sha256_of(copy / "model.fp16.onnx"), "bytes": len(garbage)}
        )
        files = {**bundle.manifest.files, "model.fp16.onnx": entry}
        sealed = bundle.manifest.model_copy(update={"files": files}).sealed()
        (copy / "manifest.json").write_text(sealed.to_json())
        with pytest.raises(BadBundle, match=said) as caught:
            summarize(Bundle.open(copy))
        assert "model.fp16.onnx" in str(caught.value)
        assert caught.value.hint.startswith("emoexport build")


WITHOUT_TORCH = """
import sys
class Refuse:
    def find_spec(name, *_):
        if name.split(".")[0] in {"torch", "timm", "lightning", "onnxruntime"}:
            raise ImportError(name)
sys.meta_path.insert(0, Refuse)
from emoexport.cli import main
main()
"""


def test_json_is_all_that_is_printed_and_torch_is_not_needed(bundle, summary, tmp_path):
    """Without torch, and where the training run is gone."""
    copy = rewritten(bundle, tmp_path / "copy", run="../nowhere")
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, "inspect", copy, "--json"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    found = BundleSummary.model_validate_json(done.stdout)
    assert found.graphs == summary.graphs
    assert found.gflop_a_face == summary.gflop_a_face
