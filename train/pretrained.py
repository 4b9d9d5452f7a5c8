"""What a network begins with: random weights, timm's for its backbone, or a member's."""

import difflib
import textwrap
from pathlib import Path

import timm
import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from torch import Tensor

from emoexport.errors import BadCheckpoint, MissingRuntime, UsageError
from emoexport.files import sha256_of
from emoexport.train.config import ModelConfig, RunConfig
from emoexport.train.emotenet import ConvNeXtEmoteNet, create_backbone
from emoexport.train.weights import read_weights

__all__ = ["find_start", "load_start"]

_FILE = "model.safetensors"
"""What timm calls the weights in each of its repositories."""

_ANSWER_WITHIN_S = 10.0


def load_start(network: ConvNeXtEmoteNet, config: RunConfig) -> str:
    """Give a new network the weights that the configuration has it begin with.

    `training.pretrained` takes timm's weights of the backbone, from the cache of huggingface_hub or its server.
    `training.init_from` takes a file: timm's weights of the backbone as published, whose classifier is left out, or
    a member of a run of the same `[model]`. timm's weights are fitted to the channels and the size of the faces as
    timm does it.

    Args:
        network: made from `config.model`; its weights are replaced in place.
        config: of the run.

    Returns:
        A sentence on what was loaded, for the log.

    Raises:
        UsageError: if timm has no weights of the backbone.
        MissingRuntime: if they are not on this machine and cannot be had over the network.
        BadCheckpoint: if a file is missing or damaged, holds code or values that are not finite, or does not fit.
    """
    path = find_start(config)
    if path is None:
        return "beginning with random weights"
    state = read_weights(path)
    broken = [name for name, value in state.items() if not torch.isfinite(value).all()]
    if broken:
        raise BadCheckpoint(
            f"{path} holds values that are not finite, in {broken[0]} and {len(broken) - 1} other tensors.",
            hint="take another file",
        )
    if "classifier.output.weight" in state:
        loaded = f"a member's {_load_member(network, state, path)} tensors"
    else:
        loaded = f"timm's {_load_backbone(network, config.model, state, path)} weights of the backbone"
    return f"beginning with {loaded}, from {path} (SHA-256 {sha256_of(path)[:12]}…)"


def find_start(config: RunConfig) -> Path | None:
    """The file with the weights to begin with, downloaded if need be; None for random ones.

    Raises:
        UsageError: if timm has no weights of the backbone.
        MissingRuntime: if they are not on this machine and cannot be had over the network.
        BadCheckpoint: if there is no such file.
    """
    if config.training.pretrained:
        return _download(config.model.backbone)
    path = Path(config.training.init_from)
    if config.training.init_from and not path.is_file():
        raise BadCheckpoint(f"there are no weights at {path}.", hint="--init-from takes a .safetensors or .pth file")
    return path if config.training.init_from else None


def _load_member(network: ConvNeXtEmoteNet, state: dict[str, Tensor], path: Path) -> int:
    try:
        network.load_state_dict(state)
    except RuntimeError as err:
        raise BadCheckpoint(
            f"{path} is a member of another network: {_shortly(err)}",
            hint="train with the [model] of that member's run, which is in the JSON file beside it",
        ) from err
    return len(state)


def _load_backbone(network: ConvNeXtEmoteNet, model: ModelConfig, state: dict[str, Tensor], path: Path) -> int:
    """Load what timm makes of the file; return how many weights that were random it has replaced: all.

    timm says nothing of weights that a file lacks. So the backbone is made twice from one seed, with the file and
    without: what is then the same to the last bit was not in the file.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plain = create_backbone(model)
        torch.manual_seed(0)
        try:
            given = create_backbone(model, pretrained=True, pretrained_cfg_overlay={"state_dict": dict(state)})
        except UsageError as err:
            raise BadCheckpoint(
                f"{path} does not fit the backbone '{model.backbone}' with {model.backbone_args or 'no arguments'}: "
                f"{_shortly(err.__cause__)}",
                hint="name the backbone that the file is of, and no backbone_args that change its layers",
            ) from err
    found = given.state_dict()
    random = {
        name: value
        for name, value in plain.named_parameters()
        if value.requires_grad and value.ndim > 1 and (value != value.flatten()[0]).any()
    }
    missing = [name for name, value in random.items() if torch.equal(value, found[name])]
    if missing:
        raise BadCheckpoint(
            f"{path} holds {len(random) - len(missing)} of the {len(random)} weights of the backbone "
            f"'{model.backbone}'; there is none for {missing[0]}.",
            hint="name the backbone that the file is of",
        )
    network.backbone.load_state_dict(found)
    return len(random)


def _download(backbone: str) -> Path:
    """The file with timm's weights of a backbone, from the cache or over the network.

    Raises:
        UsageError: if there are none.
        MissingRuntime: if they cannot be had, with what to fetch and where to put it.
    """
    known = timm.get_pretrained_cfg(backbone)
    if known is None or not (known.hf_hub_id or known.url):
        near = difflib.get_close_matches(backbone, timm.list_pretrained(), n=4, cutoff=0.0)
        raise UsageError(
            f"timm has no pretrained weights of '{backbone}'; it has of {', '.join(near)} and others.",
            hint="name one of these as backbone, or set pretrained = false in [training]",
        )
    repository = known.hf_hub_id or ""
    url = hf_hub_url(repository, _FILE) if repository else known.url
    try:
        if not repository:
            raise ConnectionError("they are published elsewhere than the others")
        cached = try_to_load_from_cache(repository, _FILE)
        if isinstance(cached, str):
            return Path(cached)
        get_hf_file_metadata(url, timeout=_ANSWER_WITHIN_S)  # a single try; the download makes six, half a minute
        return Path(hf_hub_download(repository, _FILE))
    except Exception as err:  # the HTTP client beneath has changed with the versions, and its errors with it
        name = f"weights/{repository.rpartition('/')[2] or backbone}{Path(url).suffix}"
        raise MissingRuntime(
            f"the weights of '{backbone}' are not on this machine and could not be downloaded: {_shortly(err)}",
            hint=f"download {url} elsewhere, save it as {name}, and train with --init-from {name}",
        ) from err


def _shortly(err: BaseException | None) -> str:
    """What a library says over many lines, on one; a KeyError says the key alone."""
    if isinstance(err, KeyError):
        return f"there is no {err}"
    return textwrap.shorten(str(err), 300, placeholder=" …")
