"""Mistakes and verdicts at the command line: exit code, what is said, what comes next, and that nothing is left behind.

What only a kill, a full disk, a race, or a machine that lacks something brings about is in the tests of these.
"""

import dataclasses
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from emoexport import certification
from emoexport.bundle import Bundle
from emoexport.files import sha256_of, write_text
from emoexport.labels import EMOTIONS
from emoexport.manifest import MANIFEST_FILE, FileEntry, PackageEntry
from emoexport.saved_answers import SavedAnswers
from emoexport.train.checkpoint import save_member
from emoexport.train.config import ModelConfig
from emoexport.train.emotenet import ConvNeXtEmoteNet

# What is typed, the exit code, the start of what is said, and what it says comes next. {…} are the places below.
MISTAKES = [
    # The command itself
    ("fly", 2, "", ""),
    ("train --epochs none", 2, "", ""),
    # Training
    (
        "train --data no/such/data",
        4,
        "there is no data at no/such/data",
        "--data takes a folder tree, a FER-2013 CSV, a Parquet file",
    ),
    ("train --data synthetic:7", 2, "'synthetic:7' needs a number", ""),
    ("train --preset huge", 2, "there is no preset 'huge'; there are cpu, guide, tiny", ""),
    (
        "train --epochs 2 --data synthetic:140",
        2,
        "2 epochs cannot give 5 checkpoints",
        "--epochs 5 or more, or --members 2",
    ),
    ("train --label-order klingon --data {empty_class}", 2, "'klingon' is no known label order", ""),
    (
        "train --data {empty_class}",
        4,
        "{empty_class}: the split 'train' has no face of 'fear'",
        "add faces of it, or leave the split out",
    ),
    (
        "train --data {unknown_class}",
        4,
        "{unknown_class}/train/furious/1.png: 'furious' is no label",
        "where numbers mean something else, --label-order says what:",
    ),
    (
        "train --data {unreadable}",
        4,
        "{unreadable}/train/angry/1.png: this is no picture",
        "--skip-bad leaves out what cannot be read",
    ),
    (
        "train --init-from no.safetensors",
        4,
        "there are no weights at no.safetensors",
        "--init-from takes a .safetensors or .pth file",
    ),
    ("train --resume", 2, "there is no unfinished training of runs/synthetic-tiny", "leave --resume out"),
    ("train --set training.swa=3", 2, "preset tiny: there is no setting 'training.swa'", ""),
    (
        "train --config no.toml",
        2,
        "no.toml cannot be read as text",
        "--preset names one of ours; train/presets has them as",
    ),
    (
        "train --config {misspelt}",
        2,
        "{misspelt}: there is no setting 'training.learnig_rate'; did you mean 'learning_r",
        "",
    ),
    ("train --data synthetic:140 --out {thesis}", 2, "{thesis} holds other files", "name an empty or a new directory"),
    ("train --data synthetic:140 --out {thesis}/thesis.txt", 2, "{thesis}/thesis.txt is a file", "name another output"),
    # Data
    (
        "data audit no/such/data",
        4,
        "there is no data at no/such/data",
        "--data takes a folder tree, a FER-2013 CSV, a Parquet file",
    ),
    (
        "data balance no/such/data --out {new}",
        4,
        "there is no data at no/such/data",
        "--data takes a folder tree, a FER-2013 CSV, a Parquet file",
    ),
    # Evaluation
    ("evaluate", 2, "nothing is named, and there is no runs/*/run.json", "emoexport train"),
    (
        "evaluate --model-path no/such/model",
        4,
        "there is no model at no/such/model",
        "--model-path takes a training run, or a member's .json or",
    ),
    (
        "evaluate --model-path {thesis}",
        4,
        "{thesis} is no training run: there is no run.json in it",
        "emoexport train --data synthetic:5600 --out runs/x",
    ),
    (
        "evaluate --model-path {thesis}/lonely.safetensors",
        4,
        "there is no lonely.json beside {thesis}",
        "emoexport train writes members as a pair of files",
    ),
    ("evaluate --model-path {run} --model-path {run}/members/1.json", 4, "{run}/members/1.json and", "name it once"),
    (
        "evaluate --model-path {run} --model-path {strays}/large.json",
        4,
        "members do not fit together: {run}/members/1",
        "take members of one data set and one size",
    ),
    (
        "evaluate --model-path {run} --split holdout",
        2,
        "synthetic:1400 has no split 'holdout'",
        "its splits are train, validation, test",
    ),
    (
        "evaluate --model-path {run} --data {unknown_class}",
        4,
        "{unknown_class}",
        "where numbers mean something else, --label-order says what:",
    ),
    (
        "evaluate --model-path {run} --data no/such/data",
        4,
        "there is no data at no/such/data",
        "--data takes a folder tree, a FER-2013 CSV, a Parquet file",
    ),
    ("evaluate --model-path {run} --out {run}/run.json", 2, "{run}/run.json is a file", "name another --out"),
    (
        "evaluate --model-path {strays}/small.json",
        2,
        "{strays}/small.json is in no training run",
        "--data names labelled faces",
    ),
    (
        "evaluate --model-path {run} --against no/such/model",
        4,
        "there is no model at no/such/model",
        "--model-path takes a training run, or a member's .json or",
    ),
    (
        "evaluate --model-path {run} --post-process --against {strays}/small.json",
        2,
        "post-processing needs rules",
        "emoexport combine makes one run of them, with rules of its",
    ),
    (
        "evaluate --model-path {strays}/small.json --post-process",
        2,
        "post-processing needs rules",
        "emoexport combine makes one run of them, with rules of its",
    ),
    (
        "combine {run} --out {new}",
        2,
        "found 1 different of 1 runs; needed are 2 or more, each once.",
        "emoexport combine runs/a runs/b -o runs/ab",
    ),
    (
        "combine {run} no/such/run --out {new}",
        4,
        "no/such/run is no training run",
        "emoexport train --data synthetic:5600 --out runs/x",
    ),
    ("combine {run} {evil} --out {run}", 2, "{run} is one of the runs to combine.", "name another output"),
    # Building
    ("build", 2, "nothing is named, and there is no runs/*/run.json", "emoexport train"),
    ("build no/such/run", 4, "no/such/run is no training run", "emoexport train --data synthetic:5600 --out runs/x"),
    ("build {evil}", 4, "{evil}/members/1.safetensors has the SHA-256", "restore the file, or train again"),
    ("build {run} --view nose -o {new}", 2, "'nose' is no view; known are identity, flip, ", "name some of these"),
    ("build {run} --view zoom --view zoom=2", 2, "--view names 'zoom' twice", "--view zoom=2"),
    (
        "build {run} --view zoom=-1",
        2,
        "--view zoom=-1: the weight is '-1'; needed is a finite number above 0.",
        "--view zoom=2",
    ),
    ("build {run} --member 1 --member 01", 2, "--member names one member twice", "--member 1 --member 2=0.5"),
    (
        "build {run} --member 3 -o {new}",
        2,
        "there is no member 3; the run has 2, counted from 1.",
        "--member takes 1 to 2",
    ),
    ("build {run} --member first", 2, "--member first: 'first' is no number of a member.", "--member 1 is the first"),
    ("build {run} --member 1=nan", 2, "--member 1=nan: the weight is 'nan'", "--member 1=2"),
    ("build {run} --layout stack -o {new}", 2, "'stack' is no layout; known are branches, stacked and auto.", ""),
    ("build {run} -o {thesis}", 2, "{thesis} holds other files", "name an empty or a new directory"),
    (
        "build {run} --int8 --calib-data no/such/data -o {new}",
        4,
        "there is no data at no/such/data",
        "--data takes a folder tree, a FER-2013 CSV, a Parquet file",
    ),
    (
        "build {run} --int8 --calib-method median -o {new}",
        2,
        "'median' is no calibration method; known are min-max, ",
        "",
    ),
    (
        "build {run} --int8 --calib-random --calib-data x -o {new}",
        2,
        "--calib-random is given together with faces",
        "leave --calib-random out: real faces give better ranges",
    ),
    ("build {run} --tuning {thesis}/thesis.txt -o {new}", 4, "{thesis}/thesis.txt", "emoexport tune"),
    ("build {run} --plan no/plan.json -o {new}", 4, "no/plan.json cannot be read", "emoexport plan"),
    ("build {run} --plan no/plan.json --view flip", 2, "found --plan, and passes besides it", "leave out --plan"),
    (
        "build {bundle}",
        2,
        "{bundle} is a bundle; what can be built into it are engines of tensorrt, ",
        "emoexport build {bundle} --engine tensorrt",
    ),
    (
        "build {bundle} --engine inductor",
        2,
        "{bundle} is a bundle; what can be built into it are engines of ",
        "emoexport build {bundle} --engine tensorrt",
    ),
    (
        "build {bundle} --engine tensorrt-rtx --layout auto",
        2,
        "{bundle} is a bundle, which is folded already; ",
        "name the training run",
    ),
    ("build {bundle} --engine tpu", 2, "'tpu' is no engine that is built; known are inductor, tensorrt, ", ""),
    (
        "build {bundle} --engine tensorrt-rtx --max-batch 65",
        2,
        "found --max-batch 65; {bundle} takes up to 64 ",
        "--max-batch 64",
    ),
    (
        "build {bundle} --engine tensorrt-rtx --opt-batch 99",
        2,
        "found --min-batch 1, --opt-batch 99, ",
        "name all three, or leave them out",
    ),
    (
        "build {bundle} --engine tensorrt --compute-capability 8.9",
        2,
        "--compute-capability is of TensorRT-RTX",
        "--engine tensorrt-rtx, or --hardware-compatible ampere-plus",
    ),
    (
        "build {bundle} --engine tensorrt-rtx --compute-capability new",
        2,
        "'new' is no compute capability of its cards",
        "",
    ),
    ("inspect", 2, "nothing is named, and there is no build/*/manifest.json", "emoexport build"),
    ("inspect no/such/bundle --json", 4, "no/such/bundle is no bundle", "emoexport build runs/x -o build/x"),
    ("inspect {run}", 4, "{run} is no bundle: there is no manifest.json in it.", "emoexport build {run}"),
    ("inspect {torn}", 4, "{torn}/model.fp32.onnx has", "emoexport build "),
    ("tune no/such/bundle", 4, "no/such/bundle is no bundle", "emoexport build runs/x -o build/x"),
    ("tune {bundle} --precision fp16 -o {new}", 2, "'fp16' cannot be tuned; needed is a precision of 8 bits", ""),
    (
        "tune {bundle} --faces 70 --max-drop 1 -o {new}",
        2,
        "70 of 210 validation faces cannot show that at most 1",
        "--faces with more, or --max-drop with a larger loss",
    ),
    ("tune {bundle} --max-drop 10 --engine inductor -o {new}", 2, "AOTInductor takes no int8 graph", ""),
    (
        "tune {bundle} --max-drop 10 --precision fp8 -o {new} --faces 70",
        3,
        "no engine here runs fp8 graphs",
        "--precision with another one",
    ),
    (
        "tune {bundle} --max-drop 10 --data synthetic:700 -o {new}",
        4,
        "the validation faces in synthetic:700 have the SHA-256",
        "name where those are: others may be faces that the members",
    ),
    ("tune {bundle} --max-drop 10 --engine tpu -o {new}", 2, "'tpu' is no engine", ""),
    # Verdicts and figures
    ("verify", 2, "nothing is named, and there is no build/*/manifest.json", "emoexport build"),
    ("verify no/such/bundle", 4, "no/such/bundle is no bundle", "emoexport build runs/x -o build/x"),
    ("verify {torn}", 4, "{torn}/model.fp32.onnx has", "emoexport build "),
    ("verify {bundle} --engine tpu", 2, "'tpu' is no engine", ""),
    ("verify {bundle} --precision bf17", 2, "'bf17' is no precision", ""),
    (
        "verify {bundle} --engine inductor",
        4,
        "{bundle} has no engine for inductor, which takes fp32, bf16.",
        "emoexport build ",
    ),
    (
        "verify {bundle} --split holdout",
        2,
        "synthetic:1400 has no split 'holdout'",
        "its splits are train, validation, test",
    ),
    (
        "verify {bundle} --run no/such/run",
        4,
        "the training run of {bundle} is not at no/such/run",
        "--run names its directory",
    ),
    ("verify {bundle} --batch 65", 2, "found --batch 65", "--batch 64"),
    (
        "verify {bundle} --from no.npz",
        4,
        "no.npz holds no answers that verify has saved",
        "emoexport verify writes reports/answers.npz",
    ),
    (
        "verify {bundle} --from no.npz --data x",
        2,
        "--data chooses what is run; --from runs nothing.",
        "leave one of the two out",
    ),
    ("bench no/such/bundle", 4, "no/such/bundle is no bundle", "emoexport build runs/x -o build/x"),
    (
        "bench {bundle} --batch 1000",
        2,
        "found batches of 1000; {bundle} takes 1 to 64 faces in a call.",
        "--batch 64, or emoexport build --max-batch N",
    ),
    ("bench {bundle} --device tpu", 2, "'tpu' is no device; known are cpu, cuda.", ""),
    (
        "bench {bundle} --device cuda --engine openvino",
        2,
        "OpenVINO runs on cpu, and the reference was to run",
        "--device cpu",
    ),
    ("bench {bundle} --compare no.json", 4, "no.json cannot be read", "emoexport bench"),
    ("report no/such/bundle", 4, "no/such/bundle is no bundle", "emoexport build runs/x -o build/x"),
    ("cube no/such/bundle", 4, "no/such/bundle is no bundle", "emoexport build runs/x -o build/x"),
    ("cube {bundle} --engine tpu", 2, "'tpu' is no engine; known are torch, ", ""),
    (
        "cube {bundle} --precision int8",
        2,
        "torch is the reference, which computes in fp32; found is int8",
        "--engine names a runtime of graphs",
    ),
    (
        "cube {bundle} --split holdout",
        2,
        "synthetic:1400 has no split 'holdout'",
        "its splits are train, validation, test",
    ),
    ("cube {bundle} -o {thesis}", 2, "{thesis} holds other files", "name an empty or a new directory"),
    ("plan no/such/bundle", 4, "no/such/bundle is no", "emoexport build runs/x -o build/x"),
    ("plan {bundle} --batch 65 -o {new}", 2, "found --batch 65;", "--batch 64"),
    ("plan {bundle} -o {thesis}", 2, "{thesis} holds other files", "name an empty or a new directory"),
    ("cascade no/such/bundle", 4, "no/such/bundle is no bundle", "emoexport build runs/x -o build/x"),
    ("cascade {bundle} --exact --max-drop 1", 2, "--exact loses nothing", "leave one of them out"),
    (
        "cascade {bundle} --max-disagreement 0",
        2,
        "found a limit of 0; a cascade is certified for more than 0",
        "--exact loses nothing",
    ),
    (
        "cascade {bundle} --max-drop 100",
        2,
        "found a limit of 100; a cascade is certified for more than 0 and less",
        "--max-disagreement 1",
    ),
    ("cascade {bundle} --delta 0", 2, "found --delta 0; needed is a probability", "--delta 0.05"),
    ("cascade {bundle} --batch 65", 2, "found --batch 65; {bundle} takes up to 64 faces in a call", "--batch 64"),
    ("cascade {bundle} --engine inductor", 2, "inductor takes no graphs", "--engine names a runtime that does"),
    # Use
    ("predict", 2, "nothing is named to look at.", "emoexport predict photos/, or --camera 0"),
    ("predict {photo}", 2, "nothing is named, and there is no build/*/manifest.json", "emoexport build"),
    ("predict {photo} -b no/such/bundle", 4, "no/such/bundle is no bundle", "emoexport build runs/x -o build/x"),
    ("predict {photo} -b {torn}", 4, "{torn}/model.fp32.onnx has", "emoexport build "),
    ("predict no.png -b {bundle}", 2, "there is no file, folder or match for 'no.png'.", "name what is there; or"),
    ("predict {photo} -b {bundle} -o -", 2, "found -o -; answers go to standard output without it.", "--format csv"),
    ("predict {empty} -b {bundle}", 2, "in {empty} is no picture and no video.", "name another folder"),
    (
        "predict {photo} --camera 0 -b {bundle}",
        2,
        "found paths and a camera; needed is one of them.",
        "leave out --camera",
    ),
    (
        "predict {photo} -b {bundle} --format pdf",
        2,
        "found the format 'pdf'; known are table, jsonl, csv, parquet.",
        "-o faces.csv",
    ),
    (
        "predict {photo} -b {bundle} --format parquet",
        2,
        "Parquet is no text, and standard output is for text.",
        "-o faces.parquet",
    ),
    (
        "predict {photo} -b {bundle} --annotate {photo}",
        2,
        "{photo} is a file; needed is a directory",
        "name another --annotate",
    ),
    ("predict {photo} -b {bundle} -o {empty}", 2, "{empty} is a directory; needed is a file.", "-o {empty}/faces.csv"),
    ("predict {photo} -b {bundle} --engine tpu", 2, "'tpu' is no engine", ""),
    ("predict {photo} -b {bundle} --precision fp17", 2, "'fp17' is no precision", ""),
    ("predict {photo} -b {bundle} --cascade agreement", 4, "{bundle} has no cascade", "emoexport cascade {bundle}"),
    ("serve no/such/bundle --port 0", 4, "no/such/bundle is no bundle", "emoexport build runs/x -o build/x"),
    ("serve {torn} --port 0", 4, "{torn}/model.fp32.onnx has", "emoexport build "),
    ("serve {bundle} --engine tpu", 2, "'tpu' is no engine", ""),
    (
        "serve {bundle} --host no.such.host.invalid",
        2,
        "no.such.host.invalid:8000 cannot be opened",
        "--host names an address of this machine",
    ),
    (
        "serve {bundle} --batch 65 --port 0",
        2,
        "found a batch of 65; {bundle} takes from 1 to 64 faces.",
        "a batch of 64",
    ),
    (
        "score no/such/data --out {new} -b {bundle}",
        2,
        "there is no file, folder or match for 'no/such/data'.",
        "name what is there",
    ),
    (
        "score {thesis} --out {new} -b {bundle}",
        2,
        "in {thesis} is no picture and no Parquet file.",
        "name another folder",
    ),
    (
        "score {photos} --out {thesis} -b {bundle}",
        2,
        "{thesis} holds other files (there is no score.json in it).",
        "name an empty or a new folder",
    ),
    ("score {photos} --out {photos}/out -b {bundle}", 2, "{photos}/out lies in {photos}", "name another --out"),
    (
        "score {photos} --out {new} -b {bundle} --keep label",
        2,
        "{photos} has pictures, and columns are named.",
        "leave out --column, --id and --keep",
    ),
    ("score {table} --out {new} -b {bundle}", 4, "{table} has no column", "--column names that of the pictures"),
    (
        "score {table} --out {new} -b {bundle} --column number",
        4,
        "{table}: the column 'number' has int64; needed",
        "--column names another",
    ),
    ("score {photos} --out {new} -b {torn}", 4, "{torn}/model.fp32.onnx has", "emoexport build "),
    ("score {photos} --out ftp://x/y -b {bundle}", 2, "ftp://x/y", "name a path, or s3://bucket/folder"),
    (
        "package {bundle}",
        2,
        "found neither --triton nor --docker; needed is one of them.",
        "emoexport package {bundle} --triton triton/",
    ),
    ("package no/such/bundle --triton {new}", 4, "no/such/bundle is no bundle", "emoexport build runs/x -o build/x"),
    (
        "package {bundle} --docker {new} --triton {new}",
        2,
        "found --triton and --docker; needed is one of them.",
        "emoexport package {bundle} --triton triton/",
    ),
    (
        "package {bundle} --triton {new} --engine inductor",
        2,
        "Triton does not run AOTInductor: ",
        "--engine onnxruntime",
    ),
    (
        "package {bundle} --docker {new} --engine inductor",
        2,
        "Docker does not run AOTInductor: ",
        "--engine onnxruntime",
    ),
    (
        "package {bundle} --triton {new} --engine tensorrt-rtx",
        2,
        "Triton does not run TensorRT-RTX: ",
        "--engine onnxruntime",
    ),
    ("package {bundle} --triton {new} --engine tpu", 2, "'tpu' is no engine", ""),
    ("package {bundle} --triton {new} --precision bf17", 2, "'bf17' is no precision", ""),
    (
        "package {bundle} --triton {new} --engine tensorrt",
        4,
        "{bundle} has no engine or graph for tensorrt, which takes",
        "emoexport build {bundle} --engine tensorrt",
    ),
    (
        "package {bundle} --triton {new} --engine onnxruntime --precision bf16",
        4,
        "{bundle} has no bf16 engine or graph for onnxruntime",
        "--precision fp32, or another --engine",
    ),
    (
        "package {bundle} --triton {new} --engine onnxruntime-tensorrt --precision int8-fp16",
        2,
        "Triton allows ONNX Runtime with Tensor",
        "--engine tensorrt, or --precision fp16",
    ),
    (
        "package {bundle} --triton {new} --max-batch 65",
        2,
        "found --max-batch 65; onnxruntime-fp32 takes up to 64 faces.",
        "--max-batch 64",
    ),
    ("package {bundle} --triton {new} --name a/b", 2, "'a/b' is no name for a model", "--name emotions"),
    ("package {bundle} --triton {thesis}", 2, "{thesis} holds other files", "name an empty or a new directory"),
    ("package {bundle} --docker {thesis}", 2, "{thesis} holds other files", "name an empty or a new directory"),
    (
        "package {bundle} --docker {new} --instances 2",
        2,
        "--instances is of Triton, and found is --docker.",
        "leave out --instances",
    ),
]


@pytest.fixture(scope="module")
def places(tmp_path_factory, run_dir, bundle, faces) -> dict[str, Path]:
    """What mistakes are made with; no command may change any of it."""
    root = tmp_path_factory.mktemp("places")
    for name in ("empty_class", "unknown_class", "unreadable"):
        for label, emotion in enumerate(EMOTIONS):
            folder = root / name / "train" / emotion
            folder.mkdir(parents=True)
            row = int((faces[1] == label).argmax())
            Image.fromarray(faces[0][row, ..., 0]).save(folder / "1.png")
    (root / "empty_class/train/fear/1.png").unlink()
    (root / "unknown_class/train/fear").rename(root / "unknown_class/train/furious")
    (root / "unreadable/train/angry/1.png").write_text("not a picture")
    (root / "thesis").mkdir()
    (root / "thesis/thesis.txt").write_text("years of work")
    (root / "thesis/lonely.safetensors").write_bytes(b"x")
    (root / "misspelt").write_text("[training]\nlearnig_rate = 0.1\n")
    (root / "photos").mkdir()
    Image.fromarray(faces[0][0, ..., 0]).save(root / "photos/0.png")
    (root / "photo.png").write_bytes((root / "photos/0.png").read_bytes())
    (root / "no_photo.png").write_text("not a picture")
    (root / "empty").mkdir()
    pq.write_table(pa.table({"number": np.arange(3)}), root / "table.parquet")
    run = Path(shutil.copytree(run_dir, root / "runs" / "tiny"))
    evil = Path(shutil.copytree(run_dir, root / "evil"))
    (evil / "members/1.safetensors").write_bytes(b"\x80\x04cposix\nsystem\n")
    whole = Path(
        shutil.copytree(bundle.path, root / "build" / "tiny", ignore=shutil.ignore_patterns("reports", "engines"))
    )
    manifest = Bundle.open(whole).manifest.model_copy(update={"run": "../../runs/tiny"}).sealed()
    write_text(whole / MANIFEST_FILE, manifest.to_json())
    torn = Path(shutil.copytree(whole, root / "build" / "torn"))
    os.truncate(torn / "model.fp32.onnx", 1000)
    torch.manual_seed(1)
    for name, size in (("small", 32), ("large", 48)):
        model = ModelConfig(backbone="resnet10t", image_size=size, pyramid_channels=16, hidden=(16,))
        save_member(root / "strays", name, ConvNeXtEmoteNet(model), model=model, epoch=1, accuracy=0.1)
    return {
        "run": run,
        "evil": evil,
        "bundle": whole,
        "torn": torn,
        "new": root / "new",
        "photo": root / "photo.png",
        "no_photo": root / "no_photo.png",
        "table": root / "table.parquet",
        **{
            name: root / name
            for name in (
                "empty_class",
                "unknown_class",
                "unreadable",
                "thesis",
                "misspelt",
                "photos",
                "empty",
                "strays",
            )
        },
    }


def state_of(root: Path) -> dict[str, tuple[int, int] | None]:
    """Every file with size and time of change, and every folder: a lock may come and go in it."""
    return {
        str(path.relative_to(root)): (path.stat().st_size, path.stat().st_mtime_ns) if path.is_file() else None
        for path in sorted(root.rglob("*"))
    }


@pytest.mark.parametrize(("typed", "code", "said", "next_"), MISTAKES, ids=[row[0] for row in MISTAKES])
def test_a_mistake_gets_a_sentence_and_the_next_step_and_leaves_nothing(
    typed, code, said, next_, call, places, tmp_path, monkeypatch
):
    root = places["new"].parent
    before = state_of(root)
    monkeypatch.chdir(tmp_path)
    found, _, err = call(*typed.format(**places).split())
    assert found == code, err
    assert err.startswith(f"error: {said.format(**places)}" if said else "Usage: "), err
    assert not said or err.count("\n") == 1 + ("next: " in err), err
    assert f"\nnext: {next_.format(**places)}" in err if next_ else "next: " not in err, err
    assert state_of(root) == before
    assert list(tmp_path.rglob("*")) == []


# What is typed, the exit code, and what is printed among other things. --from judges what was answered before.
VERDICTS = [
    ("verify --from {answers} --max-drop 10 --max-disagreement 10", 0, "verdict: certified"),
    ("verify --from {answers}", 6, "verdict: not enough evidence"),
    ("verify --from {answers} --max-drop 0", 6, "of accuracy may be lost; allowed are 0"),
    ("verify --from {other_labels} --max-drop 99", 1, "% of the labels differ; allowed are 1 %"),
    (
        "verify --from {other_labels} --max-drop 1 --max-disagreement 99",
        1,
        "points of accuracy are lost; allowed are 1",
    ),
    ("verify --from {mixed_rows} --max-drop 99 --max-disagreement 99", 1, "its answers do not go together"),
]


@pytest.fixture(scope="module")
def answered(bundle, quiet, tmp_path_factory) -> dict[str, Path]:
    """What engines answered: one as it is, one that never decides as the reference, one that mixes rows."""
    root = tmp_path_factory.mktemp("answered")
    copy = Bundle.open(Path(shutil.copytree(bundle.path, root / "tiny")))
    only = {"engines": ["onnxruntime"], "precisions": ["fp32"], "batches": [4], "rounds": 1, "limit": 100}
    certification.verify(copy, run=bundle.run(), **only, console=quiet)
    honest = SavedAnswers.read(copy.path / certification.ANSWERS)
    ((name, outcome),) = honest.answers.items()
    turned = outcome._replace(label=(honest.reference.label + 1) % len(EMOTIONS))
    (engine,) = honest.facts.engines
    broken = tuple(check.model_copy(update={"largest_difference": 1.0}) for check in engine.relations)
    facts = honest.facts.model_copy(update={"engines": (engine.model_copy(update={"relations": broken}),)})
    found = {name: root / f"{name}.npz" for name in ("answers", "other_labels", "mixed_rows")}
    honest.write(found["answers"])
    dataclasses.replace(honest, answers={name: turned}).write(found["other_labels"])
    dataclasses.replace(honest, facts=facts).write(found["mixed_rows"])
    return found


@pytest.mark.parametrize(("typed", "code", "said"), VERDICTS, ids=[row[0] for row in VERDICTS])
def test_a_verdict_is_an_exit_code_and_its_reason(typed, code, said, call, answered, tmp_path, monkeypatch):
    before = {path: path.read_bytes() for path in answered.values()}
    monkeypatch.chdir(tmp_path)
    found, out, err = call(*typed.format(**answered).split())
    assert (found, err) == (code, ""), out
    assert said in out
    assert list(tmp_path.rglob("*")) == []
    assert {path: path.read_bytes() for path in answered.values()} == before


def test_what_was_compiled_for_another_machine_is_exit_code_5(call, bundle, places, tmp_path):
    """A processor without its instructions would end the process without a word."""
    copy = Path(shutil.copytree(bundle.path, tmp_path / "x"))
    (copy / "engines").mkdir(exist_ok=True)
    package = copy / "engines" / "inductor-fp32.pt2"
    package.write_bytes(b"machine code")
    entry = PackageEntry(
        file="engines/inductor-fp32.pt2",
        backend="inductor",
        precision="fp32",
        torch=torch.__version__,
        instruction_sets=("x86_64", "avx9000"),
        seconds=1.0,
    )
    listed = {entry.file: FileEntry(sha256=sha256_of(package), bytes=package.stat().st_size)}
    manifest = bundle.manifest.model_copy(
        update={"engines": {"inductor-fp32": entry}, "files": {**bundle.manifest.files, **listed}}
    )
    write_text(copy / MANIFEST_FILE, manifest.sealed().to_json())
    code, _, err = call("predict", places["photo"], "--bundle", copy, "--engine", "inductor", "--precision", "fp32")
    assert code == 5, err
    assert err.startswith(f"error: {package} was compiled for another machine: this processor lacks ")
    assert "\nnext: emoexport build " in err
