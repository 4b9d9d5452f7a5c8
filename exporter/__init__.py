"""emoexport: facial-emotion ensembles from the lab to production.

Importing this loads no torch, no onnx and no runtime.
"""

from importlib.metadata import PackageNotFoundError, version

from emoexport.errors import EmoexportError
from emoexport.labels import EMOTIONS

__all__ = ["EMOTIONS", "EmoexportError", "__version__"]

try:
    __version__ = version("emoexport")
except PackageNotFoundError:  # run from the source tree, not installed
    __version__ = "0+source"
