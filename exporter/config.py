"""What a run is made of: TOML in, JSON out, unknown keys refused with the nearest known name."""

import difflib
import hashlib
import tomllib
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from emoexport.errors import BadInput, UsageError, reason_of
from emoexport.files import read_text

__all__ = ["Record", "SealedRecord", "read_toml"]


class Record(BaseModel):
    """A frozen record with checked fields; the base of configurations and of everything kept as JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")
    written_by: ClassVar[str] = ""
    """The command that writes such a file: what comes next where one cannot be read."""

    @classmethod
    def parse(cls, data: Any, *, source: str, error: type[BadInput | UsageError] = BadInput) -> Self:
        """Build the record from plain data.

        Args:
            data: a mapping, as TOML or JSON give it.
            source: what to name in the message (a path, or the command line).
            error: the class raised.

        Raises:
            BadInput: (or `error`) naming the first field that is wrong, what was found and what is needed.
        """
        try:
            return cls.model_validate(data)
        except ValidationError as err:
            raise error(f"{source}: {_first_problem(err, cls)}") from err

    @classmethod
    def parse_json(cls, path: Path, *, inside: Path | None = None, error: type[BadInput] = BadInput) -> Self:
        """Build the record from a JSON file.

        Args:
            path: the file.
            inside: a folder that it must not lead out of; None for anywhere.
            error: the class raised.

        Raises:
            BadInput: (or `error`) if the file is missing, no JSON, or its fields are wrong.
        """
        text = read_text(path, inside=inside, error=error, hint=cls.written_by)
        try:
            return cls.model_validate_json(text)
        except ValidationError as err:
            raise error(f"{path}: {_first_problem(err, cls)}", hint=cls.written_by) from err

    def to_json(self) -> str:
        """The record as indented JSON text."""
        return self.model_dump_json(indent=2) + "\n"


class SealedRecord(Record):
    """A record that tells whether its file was changed after it was written."""

    digest: str = ""
    """SHA-256 of the record without this field."""

    def sealed(self) -> Self:
        """The same record, every field set, with its digest."""
        whole = type(self).model_validate_json(self.model_dump_json())
        return whole.model_copy(update={"digest": whole._digest()})

    def is_intact(self) -> bool:
        """Whether the digest fits."""
        return self.digest == self._digest()

    def _digest(self) -> str:
        # Of the fields that the file has: one written before a field was added is as intact as it was then.
        text = self.model_dump_json(exclude={"digest"}, exclude_unset=True)
        return hashlib.sha256(text.encode()).hexdigest()


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        UsageError: if it is missing or no TOML.
    """
    hint = "--preset names one of ours; train/presets has them as examples"
    try:
        return tomllib.loads(read_text(path, error=UsageError, hint=hint))
    except (tomllib.TOMLDecodeError, RecursionError) as err:
        raise UsageError(f"{path} cannot be read as TOML: {reason_of(err)}.", hint=hint) from err


def _first_problem(err: ValidationError, cls: type[BaseModel]) -> str:
    problem = err.errors(include_url=False)[0]
    field = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        fields = _owner(cls, problem["loc"][:-1]).model_fields
        near = difflib.get_close_matches(str(problem["loc"][-1]), fields, n=1)
        known = f"did you mean '{near[0]}'?" if near else f"known are {', '.join(sorted(fields))}."
        return f"there is no setting '{field}'; {known}"
    found = "" if problem["type"] == "missing" else f" (found {str(problem['input'])[:80]!r})"
    return f"'{field}': {problem['msg']}{found}." if field else f"{problem['msg']}."


def _owner(cls: type[BaseModel], path: tuple[int | str, ...]) -> type[BaseModel]:
    """The record that a path of field names leads to, as far as it leads through records."""
    for part in path:
        inner = cls.model_fields[part].annotation if part in cls.model_fields else None
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            cls = inner
    return cls
