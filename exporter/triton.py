"""A model repository for Triton, of one engine of a bundle: configuration, graph or plan, labels, a client."""

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from emoexport.errors import UsageError
from emoexport.files import new_directory, write_text
from emoexport.packaging import RECORD, Packed, Target, render, write_record
from emoexport.triton_config import SERVED, Model, model_config, to_text

__all__ = ["CONTAINER", "TRITON", "ServerSettings", "notes_for_triton", "write_repository"]

CONTAINER = "nvcr.io/nvidia/tritonserver:26.07-py3"
"""Triton's image that the README of a package names."""
_MOST = 64
"""Faces in a call that are taken without being asked for."""

TRITON = Target(
    title="Triton",
    runs=("onnxruntime", "onnxruntime-cuda", "onnxruntime-tensorrt", "tensorrt"),
    refused={
        "inductor": "a package runs with the very PyTorch that compiled it, and Triton's container has its own.",
        "tensorrt-rtx": "its TensorRT backend loads engines of TensorRT, not of TensorRT-RTX.",
    },
)


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """What may be asked of Triton."""

    name: str | None = None
    """Of the model; that of the bundle's directory if none."""
    max_batch: int | None = None
    """The largest number of faces in a call; what the engine takes, up to 64, if none."""
    queue_delay_us: int = 1000
    """How long a request may wait for others to be computed with, microseconds."""
    instances: int = 1
    """How many calls are computed at once, on each GPU or on the CPU."""


def write_repository(packed: Packed, out: Path, settings: ServerSettings) -> Model:
    """Write a package for Triton, whole or not at all.

    Args:
        packed: the engine.
        out: the directory, which gets `model_repository/`, `client.py`, `README.md` and `emoexport.json`.
        settings: of the server.

    Returns:
        What its configuration says.

    Raises:
        UsageError: if Triton cannot run the engine as it is, a setting is not for it, or `out` holds other things.
    """
    model = _model(packed, settings)
    row = SERVED[packed.backend]
    with new_directory(out, marker=RECORD) as folder:
        home = folder / "model_repository" / model.name
        (home / "1").mkdir(parents=True)
        shutil.copyfile(packed.file, home / "1" / row.file)
        if packed.weights is not None:  # under the name that the graph has for them
            shutil.copyfile(packed.weights, home / "1" / packed.weights.name)
        write_text(home / "labels.txt", "".join(f"{label}\n" for label in packed.bundle.manifest.labels))
        write_text(home / "config.pbtxt", to_text(model_config(model)))
        words = {"model": model, "row": row, "packed": packed, "manifest": packed.bundle.manifest}
        write_text(folder / "client.py", render("triton_client.py.j2", **words))
        notes = notes_for_triton(packed)
        about = {"container": CONTAINER, "notes": notes, "options": _server_options(packed)}
        write_text(folder / "README.md", render("triton_readme.md.j2", **words, **about))
        write_record(folder, packed, TRITON)
    return model


def notes_for_triton(packed: Packed) -> list[str]:
    """What whoever serves an engine must know, a sentence or two each."""
    if packed.passport is not None:
        return [_where_it_runs(packed)]
    if SERVED[packed.backend].backend == "openvino":
        return [
            "Triton's OpenVINO backend computes in BF16 on processors that have it, whatever the graph is in, and has "
            "no setting against that: a certificate holds on other processors only. It computes requests one by one, "
            "as they come: several faces in a request go together, several requests do not."
        ]
    return [
        "Triton's container has a version of ONNX Runtime of its own; a certificate is for the version that it names."
    ]


def _where_it_runs(packed: Packed) -> str:
    passport = packed.passport
    assert passport is not None
    device, version = passport.device, passport.versions[passport.backend]
    hardware = passport.settings.get("hardware_compatible")
    kind = (
        f"{device.get('name', 'the GPU it was built on')} (compute capability {device.get('compute_capability', '?')})"
    )
    where = {None: kind, "ampere-plus": "GPUs of compute capability 8.0 or more"}.get(
        hardware, f"GPUs of compute capability {device.get('compute_capability', '?')}"
    )
    which = f"{version} or a later {version.partition('.')[0]}" if _is_compatible(packed) else version
    return f"The plan runs on {where} with TensorRT {which}: take the container of Triton that has this version."


def _is_compatible(packed: Packed) -> bool:
    return packed.passport is not None and bool(packed.passport.settings.get("version_compatible"))


def _server_options(packed: Packed) -> list[str]:
    """Of `tritonserver`, beside the repository."""
    return ["--backend-config=tensorrt,version-compatible=true"] if _is_compatible(packed) else []


def _model(packed: Packed, settings: ServerSettings) -> Model:
    _require_served(packed)
    manifest = packed.bundle.manifest
    most = packed.most
    if settings.max_batch is not None and settings.max_batch > most:
        raise UsageError(
            f"found --max-batch {settings.max_batch}; {packed.name} takes up to {most} faces.",
            hint=f"--max-batch {most}",
        )
    name = (
        settings.name or re.sub(r"[^A-Za-z0-9_.-]+", "-", packed.bundle.path.resolve().name).strip("-.") or "emotions"
    )
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
        raise UsageError(
            f"'{name}' is no name for a model; needed are letters, digits, '_', '-' and '.'.", hint="--name emotions"
        )
    passport = packed.passport
    has_int64 = passport is None or int(passport.versions[passport.backend].partition(".")[0]) >= 10
    return Model(
        name=name,
        backend=packed.backend,
        precision=packed.precision,
        face_shape=manifest.face_shape,
        scores_shape=(len(manifest.members), len(manifest.views), len(manifest.labels)),
        max_batch=settings.max_batch or min(_MOST, most),
        profiles=passport.profiles if passport else (),
        label_type="TYPE_INT64" if has_int64 else "TYPE_INT32",
        queue_delay_us=settings.queue_delay_us,
        instances=settings.instances,
        parameters={
            "emoexport.bundle_digest": manifest.digest,
            "emoexport.engine": packed.name,
            "emoexport.precision": packed.precision,
            "emoexport.certificate": packed.standing,
            "emoexport.labels": ",".join(manifest.labels),
        },
    )


def _require_served(packed: Packed) -> None:
    """Refuse what Triton would load and not run, or run otherwise.

    Raises:
        UsageError: saying why.
    """
    if packed.backend == "onnxruntime-tensorrt" and "-" in packed.precision:
        raise UsageError(
            f"Triton allows ONNX Runtime with TensorRT one type of numbers besides FP32; {packed.name} needs two.",
            hint="--engine tensorrt, or --precision fp16",
        )
    passport = packed.passport
    if passport is None:
        return
    again = f"emoexport build {packed.bundle.path} --engine {packed.backend} --{packed.precision}"
    least = min(least for least, _, _ in passport.profiles)
    if least > 1:
        raise UsageError(
            f"{packed.name} takes no fewer than {least} faces, and Triton does not fill calls up.",
            hint=f"{again} --min-batch 1",
        )
    if passport.settings.get("strip"):
        raise UsageError(f"{packed.name} has no weights, and Triton puts none in.", hint=f"{again}, without --strip")
