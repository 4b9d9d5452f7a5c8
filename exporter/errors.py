"""Every error that emoexport raises on purpose.

    EmoexportError                 exit code
    ├── CheckFailed                1  a comparison was made and did not hold
    ├── EngineFailed               1  a runtime raised an error in a call
    ├── UsageError (ValueError)    2  the command or its options make no sense
    ├── MissingRuntime (ImportError)  3  this machine lacks a package or a device
    ├── WrongMachine               5  machine code of a bundle was compiled for another kind of machine
    ├── Busy                       4  another command is writing the same thing
    ├── DiskFull (OSError)         4  there is no room for what was to be written
    └── BadInput (ValueError)      4  something that was read is not what it must be
        ├── BadData                   faces and labels
        ├── BadCheckpoint             members
        └── BadBundle                 what `build` wrote

`verify` ends with 6 where there is not enough evidence for a verdict: no error, and its report is written.

The message says what was found and what was needed; `hint` is the next command or the next step.
Exceptions of other libraries are mapped to these where they arise, with `raise ... from err`.
"""

from typing import ClassVar

__all__ = [
    "BadBundle",
    "BadCheckpoint",
    "BadData",
    "BadInput",
    "Busy",
    "CheckFailed",
    "DiskFull",
    "EmoexportError",
    "EngineFailed",
    "MissingRuntime",
    "UsageError",
    "WrongMachine",
    "reason_of",
]


class EmoexportError(Exception):
    """The root: catch this to catch everything that emoexport raises on purpose."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(_printable(message))
        self.hint = _printable(hint)


def _printable(text: str) -> str:
    """What is quoted from files may have characters that move a terminal's cursor, or that cannot be written at all."""
    return "".join(one if one.isprintable() or one in "\n\t" else ascii(one)[1:-1] for one in text)


class CheckFailed(EmoexportError):
    """A check ran to its end and its answer is no."""

    exit_code = 1


class EngineFailed(EmoexportError):
    """A runtime raised an error in a call; the next call is another matter."""


class UsageError(EmoexportError, ValueError):
    """An option is unknown, missing or contradicts another."""

    exit_code = 2


class MissingRuntime(EmoexportError, ImportError):
    """This machine lacks a package or a device that the call needs."""

    exit_code = 3


class WrongMachine(EmoexportError):
    """A compiled engine needs a processor or a version of its runtime that this machine does not have."""

    exit_code = 5


class Busy(EmoexportError):
    """Another command is writing what this one is to write. Nothing was changed; later it may be free."""

    exit_code = 4


class DiskFull(EmoexportError, OSError):
    """There is no room for what was to be written, at `path`. What stood there is as it was."""

    exit_code = 4

    def __init__(self, message: str, *, hint: str = "", path: str = "") -> None:
        super().__init__(message, hint=hint)
        self.path = path


class BadInput(EmoexportError, ValueError):
    """A file or an array is not what it must be."""

    exit_code = 4


class BadData(BadInput):
    """A data set, an image or a label cannot be used."""


class BadCheckpoint(BadInput):
    """A member cannot be rebuilt from its files, or members do not fit together."""


class BadBundle(BadInput):
    """A bundle is incomplete, was changed after it was written, or is of another schema."""


def reason_of(err: Exception) -> str:
    """What an error of another library says, without the number and the path of those of the system."""
    return (isinstance(err, OSError) and err.strerror) or str(err)
