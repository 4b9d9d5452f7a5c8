"""The reference of a bundle, opened from the run that it was built from."""

from pathlib import Path

from emoexport.bundle import Bundle
from emoexport.engines.torch_engine import TorchEngine
from emoexport.errors import BadCheckpoint
from emoexport.reference import Reference
from emoexport.train.checkpoint import MemberRecord, RunRecord, load_members, read_run
from emoexport.views import views_named

__all__ = ["open_judge", "open_reference", "run_of"]


def run_of(bundle: Bundle, run: Path | None = None) -> tuple[Path, RunRecord]:
    """The run that a bundle was built from, and its record.

    Args:
        bundle: the bundle.
        run: where the run is now, if it was moved.

    Raises:
        BadCheckpoint: if it is not there, or another one, or a member that was folded is not in it.
    """
    where = run or bundle.run()
    if not where.is_dir():
        raise BadCheckpoint(
            f"the training run of {bundle.path} is not at {where}; the reference is rebuilt from it.",
            hint="--run names its directory",
        )
    record = read_run(where)
    known = bundle.manifest.data
    if any(getattr(record.data, name) != known.get(name) for name in ("train_sha256", "validation_sha256")):
        raise BadCheckpoint(
            f"the run in {where} was trained on other faces than that which {bundle.path} was built from.",
            hint=f"emoexport build {where} -o {bundle.path}",
        )
    members = {MemberRecord.parse_json(where / name, error=BadCheckpoint).sha256 for name in record.members}
    if any(member.sha256 not in members for member in bundle.manifest.members):
        raise BadCheckpoint(
            f"the members in {where} are not those that {bundle.path} was built from.",
            hint=f"emoexport build {where} -o {bundle.path}",
        )
    return where, record


def open_reference(bundle: Bundle, run: Path | None = None) -> tuple[Reference, Path, RunRecord]:
    """Rebuild the PyTorch reference of a bundle from the run it was built from.

    Args:
        bundle: the bundle.
        run: where the run is now, if it was moved.

    Raises:
        BadCheckpoint: if the run is not there, or a member that was folded is not in it.
    """
    where, record = run_of(bundle, run)
    manifest = bundle.manifest
    found = {entry.sha256: member for entry, member in zip(*load_members(where), strict=True)}
    reference = Reference(
        members=[found[member.sha256] for member in manifest.members],
        views=views_named([view.name for view in manifest.views]),
        decision=manifest.decision,
        weights=manifest.weights,
    )
    return reference, where, record


def open_judge(bundle: Bundle, reference: Reference, threads: int | None = None, *, device: str = "cpu") -> TorchEngine:
    """The reference as an engine that takes what those of the bundle take, its members moved to a device."""
    manifest = bundle.manifest
    for member in reference.members:
        member.to(device)
    return TorchEngine(reference, face_shape=manifest.face_shape, max_batch=manifest.max_batch, threads=threads)
