"""Files of weights, read as plain tensors: nothing in them can run."""

import contextlib
import pickle
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from emoexport.errors import BadCheckpoint

__all__ = ["parameters_on_meta", "read_weights"]

_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")
"""What published checkpoints call the state_dict among other things; averaged weights are preferred."""

_HINT = "save the state_dict alone, best as safetensors; a pickle that would run code is never loaded"


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read safetensors, or a foreign `.pth`, `.pt` or `.ckpt` with a state_dict.

    Raises:
        BadCheckpoint: if the file is missing or damaged, or holds anything that is not a plain tensor.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as err:
        first = (str(err).strip() or type(err).__name__).splitlines()[0]
        raise BadCheckpoint(f"{path} cannot be read as plain tensors: {first}", hint=_HINT) from err
    if isinstance(state, dict):
        state = next((state[name] for name in _WRAPPERS if name in state), state)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise BadCheckpoint(f"{path} holds a {type(state).__name__}; needed is a state_dict of tensors.", hint=_HINT)
    return state


@contextlib.contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Make networks whose parameters have shapes and no values, and whose buffers are as ever.

    For those whose weights are read right after: drawing 200 million numbers at random takes seconds. PyTorch's
    `torch.device("meta")` would take the values of buffers too, which a file of weights need not have.
    """
    honest = nn.Module.register_parameter

    def without_values(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        honest(self, name, None if param is None else nn.Parameter(param.to("meta"), param.requires_grad))

    nn.Module.register_parameter = without_values  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = honest  # type: ignore[method-assign]
