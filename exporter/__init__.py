"""emoexport: facial-emotion ensembles from the lab to production.

Importing this loads no torch, no onnx and no runtime.
"""

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from emoexport.errors import EmoexportError
from emoexport.labels import EMOTIONS

if TYPE_CHECKING:
    from emoexport.runtime import Session, load

__all__ = ["EMOTIONS", "EmoexportError", "Session", "__version__", "load"]

try:
    __version__ = version("emoexport")
except PackageNotFoundError:  # run from the source tree, not installed
    __version__ = "0+source"


def __getattr__(name: str) -> Any:
    if name in {"Session", "load"}:
        from emoexport import runtime  # noqa: PLC0415 (it loads pydantic and scipy)

        return getattr(runtime, name)
    raise AttributeError(f"module 'emoexport' has no attribute '{name}'")
