"""What a bundle was made of, and by what: for its manifest, and as a bill of materials that others' tools read."""

import hashlib
import json
import os
import platform
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path

from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model import HashAlgorithm, HashType
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output import make_outputter
from cyclonedx.schema import OutputFormat, SchemaVersion
from packageurl import PackageURL

from emoexport.engines.machine import describe_processor
from emoexport.files import sha256_of, write_text
from emoexport.manifest import MemberEntry, ProvenanceEntry
from emoexport.requirements import distribution_of, needed_by, own_files, version_here
from emoexport.run_faces import data_name
from emoexport.train.checkpoint import DataRecord

__all__ = ["SBOM_FILE", "record_provenance", "write_sbom"]

SBOM_FILE = "sbom.cdx.json"


def record_provenance(
    directory: Path,
    run: Path,
    *,
    members: Sequence[MemberEntry],
    data: DataRecord,
    packages: Iterable[str],
    materials: Iterable[Path],
) -> ProvenanceEntry:
    """Write the bill of materials of a bundle, and tell the rest.

    Args:
        directory: the bundle.
        run: the training run.
        members: of it, that were folded.
        data: which faces these have seen.
        packages: that made it.
        materials: files that were read, besides the members' weights, whose hashes the manifest has already.
    """
    write_sbom(directory / SBOM_FILE, run.resolve().name, members=members, data=data, packages=packages)
    return ProvenanceEntry(
        source_sha256=_source_sha256(),
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.machine()}",
        processor=describe_processor(),
        materials={os.path.relpath(file, run): sha256_of(file) for file in materials},
        sbom=SBOM_FILE,
    )


def _source_sha256() -> str:
    """Of the package's own files, by name: one that was edited is another package under the same version."""
    files = {name: sha256_of(file) for name, file in own_files().items()}
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def write_sbom(
    file: Path, name: str, *, members: Sequence[MemberEntry], data: DataRecord, packages: Iterable[str]
) -> None:
    """Write a bill of materials in CycloneDX 1.6: the members, their faces, the packages and what these need.

    The same materials give the same bytes: it tells no time, and its serial number follows from what it holds.

    Args:
        file: where.
        name: of what was made.
        members: that were folded.
        data: which faces these have seen.
        packages: that made it.

    Source: https://cyclonedx.org/docs/1.6/json/
    """
    model = Component(type=ComponentType.MACHINE_LEARNING_MODEL, name=name, bom_ref="bundle")
    faces = [
        _hashed(ComponentType.DATA, f"{data_name(data.source)} {split}", f"{split} faces", sha256)
        for split, sha256 in (("training", data.train_sha256), ("validation", data.validation_sha256))
    ]
    networks = [
        _hashed(ComponentType.MACHINE_LEARNING_MODEL, member.backbone, f"member {number}", member.sha256)
        for number, member in enumerate(members, 1)
    ]
    libraries = [_library(each) for each in sorted({*packages, *needed_by(packages)})]
    bom = Bom(components=[*faces, *networks, *libraries])
    bom.metadata.component = model
    bom.register_dependency(model, [*networks, *libraries])
    for network in networks:
        bom.register_dependency(network, faces)
    written = json.loads(make_outputter(bom, OutputFormat.JSON, SchemaVersion.V1_6).output_as_string())
    del written["metadata"]["timestamp"], written["serialNumber"]  # neither is required
    text = json.dumps(written, sort_keys=True)
    written["serialNumber"] = uuid.uuid5(uuid.NAMESPACE_OID, text).urn
    write_text(file, json.dumps(written, indent=2, sort_keys=True) + "\n")


def _hashed(kind: ComponentType, name: str, ref: str, sha256: str) -> Component:
    return Component(type=kind, name=name, bom_ref=ref, hashes=[HashType(alg=HashAlgorithm.SHA_256, content=sha256)])


def _library(name: str) -> Component:
    found = distribution_of(name)
    told = found.metadata.json if found else {}
    license_ = str(told.get("license_expression") or told.get("license") or "").strip().partition("\n")[0]
    version = version_here(name)
    return Component(
        name=name,
        version=version,
        bom_ref=name,
        purl=PackageURL("pypi", name=name, version=version),
        licenses=[LicenseFactory().make_from_string(license_)] if license_ else (),
    )
