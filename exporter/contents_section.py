"""What was built from what: the section of the page with all that went into a bundle."""

import itertools

from emoexport.decision import Decision
from emoexport.findings import Findings
from emoexport.page import Section, Sheet
from emoexport.parity import ParityReport
from emoexport.precision import PRECISIONS
from emoexport.run_faces import data_name
from emoexport.summary_tables import summary_tables

__all__ = ["contents_section"]


def contents_section(found: Findings) -> Section:
    """The way from faces to engines, and all parts with their hashes."""
    manifest, summary = found.bundle.manifest, found.summary
    files = [
        {"file": name, "bytes": f"{entry.bytes:,}", "SHA-256": entry.sha256} for name, entry in manifest.files.items()
    ]
    members = [{"member": str(number), "SHA-256": one.sha256} for number, one in enumerate(manifest.members, 1)]
    gate = [{"graph": name, "verdict": entry.verdict, "why": entry.reason} for name, entry in manifest.gate.items()]
    data = {**manifest.data, **({"source": data_name(manifest.data["source"])} if "source" in manifest.data else {})}
    made = manifest.provenance.model_dump(exclude={"materials"}) if manifest.provenance else {}
    facts = {"built": found.bundle.built, **manifest.versions, **made, **data}
    # The first title has the path of the bundle in it, which is nobody else's business.
    (_, fold), *rest = summary_tables(summary)
    tables = [("the fold", fold), *rest]
    return Section(
        anchor="made-of",
        title="What was built from what",
        steps=_steps(found),
        lines=[f"Bundle {manifest.digest}."],
        parts=[
            *(Sheet.of_terminal(title, table, folded=title not in ("members", "graphs")) for title, table in tables),
            *(
                [Sheet.of("is a graph of 8 bits worth having?", gate, texts=("graph", "verdict", "why"))]
                if gate
                else []
            ),
            Sheet.of("weights of the members", members, texts=("SHA-256",), folded=True),
            Sheet.of("files", files, texts=("file", "SHA-256"), folded=True),
            Sheet.of(
                "data and versions",
                [{"of the run": name.replace("_", " "), "": _plain(value)} for name, value in facts.items()],
                texts=("of the run", ""),
                folded=True,
            ),
        ],
    )


def _steps(found: Findings) -> list[tuple[str, str]]:
    manifest = found.bundle.manifest
    source = data_name(str(manifest.data.get("source", "faces")))
    backbones = ", ".join(dict.fromkeys(member.backbone for member in manifest.members))
    calibration = manifest.calibration
    ranges = f", calibrated on {calibration.faces:,} faces" if calibration and not calibration.random else ""
    engines = [engine.engine for engine in found.parity.engines] if isinstance(found.parity, ParityReport) else []
    return [
        ("faces", f"{source}, {manifest.data['train_faces']:,} to train" if "train_faces" in manifest.data else source),
        ("members", f"{len(manifest.members)} of {backbones}"),
        ("views", f"{len(manifest.views)}, voting by {manifest.vote}"),
        ("decision", _decision(manifest.decision)),
        ("graphs", ", ".join(PRECISIONS[name].title for name in manifest.graphs) + ranges),
        ("engines", f"{len(engines)} verified" if engines else "none verified"),
    ]


def _decision(decision: Decision) -> str:
    rules = [f"{name} from {value:g}" for name, value in decision.thresholds.items()]
    rules += [f"{one.favoured} before {one.leader} within {one.margin:g}" for one in decision.pairs]
    return "; ".join([f"temperature {decision.temperature:.3g}", *(rules or ["no thresholds or pairs"])])


def _plain(value: object) -> str:
    """A value of the manifest in words."""
    if isinstance(value, dict):
        return ", ".join(itertools.starmap(lambda name, inner: f"{name} {_plain(inner)}", value.items()))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
