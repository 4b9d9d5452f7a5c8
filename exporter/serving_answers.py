"""What the server answers: sessions, decisions and votes as JSON and as arrays."""

import base64
import io
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from emoexport.detection import DetectedFace
from emoexport.outcome import Outcome
from emoexport.runtime import Session

__all__ = ["about_face", "about_session", "about_votes", "as_png_url", "as_records"]

_DIGITS = 6
"""Of probabilities: FP32 has seven."""


def about_session(session: Session) -> dict[str, Any]:
    """What decides, and what is certified of it. Of the data of a certificate only the name is told, not the folder."""
    manifest, held = session.manifest, session.certificate
    return {
        "bundle": session.path.resolve().name,
        "digest": manifest.digest,
        "engine": session.engine,
        "precision": session.precision,
        "why": session.why,
        "notes": session.notes,
        "certificate": held and asdict(held) | {"data": Path(held.data).name},
        "is_cascade": session.left is not None,
        "labels": session.labels,
        "face_shape": session.face_shape,
        "members": len(manifest.members),
        "views": len(manifest.views),
        "decision": manifest.decision.model_dump(mode="json"),
        "batch": session.batch,
    }


def about_face(session: Session, outcome: Outcome, row: int, place: DetectedFace | None) -> dict[str, Any]:
    """What was decided about one face of an outcome, by which rule, and where it was found if it was looked for."""
    probabilities = outcome.probabilities[row]
    ruling = session.manifest.decision.ruling(probabilities)
    return {
        **({"box": place.box, "detection": round(place.score, _DIGITS)} if place else {}),
        "label": session.labels[outcome.label[row]],
        "confidence": round(float(outcome.confidence[row]), _DIGITS),
        "probabilities": dict(zip(session.labels, _rounded(probabilities), strict=True)),
        "rule": {"name": ruling.rule, "sentence": ruling.sentence},
    }


def about_votes(session: Session, scores: NDArray[np.float32]) -> dict[str, Any]:
    """What every pass says of one face.

    Args:
        session: that said it.
        scores: `(K, V, L)`.
    """
    manifest = session.manifest
    return {
        "labels": session.labels,
        "members": [entry.backbone for entry in manifest.members],
        "views": [entry.name for entry in manifest.views],
        "scores": _rounded(scores),
        "weights": None if manifest.weights is None else manifest.weights.tolist(),
    }


def as_records(outcome: Outcome) -> NDArray[Any]:
    """An outcome as one array `(N,)` of records `label`, `confidence` and `probabilities`, to the bit."""
    kinds = [("label", "<i8"), ("confidence", "<f4"), ("probabilities", "<f4", outcome.probabilities.shape[1:])]
    found = np.empty(len(outcome.label), dtype=np.dtype(kinds))
    found["label"], found["confidence"] = outcome.label, outcome.confidence
    found["probabilities"] = outcome.probabilities
    return found


def as_png_url(face: NDArray[np.uint8]) -> str:
    """A face, uint8 `(H, W, C)`, as a PNG in a URL."""
    file = io.BytesIO()
    Image.fromarray(face[..., 0] if face.shape[2] == 1 else face).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _rounded(values: NDArray[np.float32]) -> Any:
    return np.round(values.astype(np.float64), _DIGITS).tolist()
