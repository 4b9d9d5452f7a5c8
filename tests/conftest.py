"""One small data set, run and bundle for the whole session: what most tests look at."""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from emoexport import cli
from emoexport.bundle import Bundle
from emoexport.calib.record import Calibration
from emoexport.calibration import CalibrationFaces, Wish, calibrate
from emoexport.decision import Decision, PairRule
from emoexport.engines.timing import Ratio
from emoexport.labels import EMOTIONS
from emoexport.precision import PRECISIONS
from emoexport.quantize import feeds_of
from emoexport.train.config import ModelConfig, RunConfig
from emoexport.train.emotenet import ConvNeXtEmoteNet
from emoexport.train.synthetic import synthetic_faces

TINY = ModelConfig(
    backbone="convnext_atto",
    image_size=32,
    pyramid_channels=16,
    hidden=(16,),
    feature_dropout=0.1,
    head_dropout=0.1,
    backbone_args={"patch_size": 4, "depths": (1, 1, 1, 1), "dims": (16, 16, 32, 32), "conv_mlp": False},
)

TINY_TOML = """
[model]
backbone = "convnext_atto"
image_size = 32
pyramid_channels = 16
hidden = [16]
feature_dropout = 0.1
head_dropout = 0.1
[model.backbone_args]
patch_size = 4
depths = [1, 1, 1, 1]
dims = [16, 16, 32, 32]
conv_mlp = false
ls_init_value = 1.0
[training]
members = 2
epochs = 10
batch_size = 32
learning_rate = 4e-3
augmentation = 0.3
"""


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run the command line as a user would: arguments to exit code, standard output and standard error."""

    def typed(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["emoexport", *map(str, arguments)])
        with pytest.raises(SystemExit) as exited:
            cli.main()
        printed = capsys.readouterr()
        return int(exited.value.code or 0), printed.out, printed.err

    return typed


@pytest.fixture
def small_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrix products that take no time, where it matters little how fast they are."""
    from emoexport import gemm_peak

    monkeypatch.setattr(gemm_peak, "_SECONDS", 0.01)
    monkeypatch.setattr(gemm_peak, "_SIZE", {"cpu": 64})


@pytest.fixture(scope="session")
def quiet() -> Console:
    return Console(quiet=True)


@pytest.fixture(scope="session")
def faces() -> tuple[np.ndarray, np.ndarray]:
    """70 drawn faces, uint8 `(70, 32, 32, 1)`, and their labels."""
    return synthetic_faces(70, size=32, seed=5)


@pytest.fixture(scope="session")
def rules() -> Decision:
    """Rules that do change decisions of an ensemble that knows little."""
    return Decision(
        thresholds={"happy": 0.16, "sad": 0.3},
        pairs=(
            PairRule(leader="neutral", favoured="sad", margin=0.05),
            PairRule(leader="fear", favoured="surprise", margin=0.1),
        ),
    )


@pytest.fixture(scope="session")
def networks() -> list[ConvNeXtEmoteNet]:
    """Three untrained members whose logits differ enough to vote about."""
    torch.manual_seed(4)  # with it every emotion is said of some face
    made = [ConvNeXtEmoteNet(TINY).eval() for _ in range(3)]
    for network in made:
        for name, parameter in network.named_parameters():
            if parameter.ndim > 1:
                torch.nn.init.kaiming_normal_(parameter)
            elif name.endswith("gamma"):
                torch.nn.init.ones_(parameter)
        torch.nn.init.normal_(network.classifier.output.weight, std=1.0)
    return made


@pytest.fixture(scope="session")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.toml"
    path.write_text(TINY_TOML)
    return path


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory: pytest.TempPathFactory, config_file: Path, quiet: Console) -> Path:
    """A trained run of two members."""
    from emoexport.train.config import load_config
    from emoexport.train.dataset import load_data
    from emoexport.train.ensemble import train_ensemble

    config: RunConfig = load_config(file=config_file)
    out = tmp_path_factory.mktemp("runs") / "tiny"
    data = load_data("synthetic:1400", size=32)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums in the same order, so the same members, however many cores there are
    train_ensemble(config, data, out, label_order="fer2013", console=quiet)
    torch.set_num_threads(threads)
    return out


@pytest.fixture(scope="session")
def calibrated(quiet: Console) -> Callable[..., Calibration]:
    """Calibrate a graph on faces given as pixels: all but the last five, which are held out."""

    def on_faces(graph: Path, images: np.ndarray, method: str = "min-max") -> Calibration:
        counts, splits = dict.fromkeys(EMOTIONS, len(images) // 7), {"test": 1}
        chosen = CalibrationFaces(
            images=images[:-5],
            held_out=images[-5:],
            source="drawn",
            sha256="0" * 64,
            counts=counts,
            disjoint_from=splits,
            left_out=0,
        )
        return calibrate(graph, feeds_of(graph), chosen, method=method, console=quiet)

    return on_faces


@pytest.fixture(scope="session")
def int8_is_slower() -> Callable[[], AbstractContextManager[None]]:
    """A block in which no graph of 8 bits is recommended: how fast one is here must not decide what a test sees."""

    @contextmanager
    def block() -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("emoexport.gate.ratio_of", lambda *_: Ratio(value=0.9, low=0.8, high=0.95))
            yield

    return block


@pytest.fixture(scope="session")
def bundle(run_dir: Path, tmp_path_factory: pytest.TempPathFactory, quiet: Console, int8_is_slower) -> Bundle:
    """A bundle of that run at every precision."""
    from emoexport.pipeline import build

    out = tmp_path_factory.mktemp("build") / "tiny"
    precisions = [name for name in PRECISIONS if name != "fp32"]
    settings = {"calibration": Wish(faces=35), "max_batch": 64, "keep_rejected": True}
    with int8_is_slower():
        return build(run_dir, out, precisions=precisions, **settings, console=quiet)


@pytest.fixture(scope="session")
def compiled(run_dir: Path, tmp_path_factory: pytest.TempPathFactory, quiet: Console) -> Bundle:
    """A bundle of that run with what was compiled for this machine: it takes minutes.

    The process has compiled before, with other options: PyTorch keeps passes from one call to the next.
    """
    import torch

    from emoexport.pipeline import build

    with torch.no_grad():
        torch.compile(torch.nn.Conv2d(3, 8, 3).eval(), options={"freezing": True})(torch.zeros(1, 3, 8, 8))
    return build(run_dir, tmp_path_factory.mktemp("build") / "compiled", compiled=True, max_batch=64, console=quiet)


@pytest.fixture(scope="session")
def stacked_bundle(run_dir: Path, tmp_path_factory: pytest.TempPathFactory, quiet: Console) -> Bundle:
    """The same with the members stacked."""
    from emoexport.pipeline import build

    out, precisions = tmp_path_factory.mktemp("build") / "stacked", [name for name in PRECISIONS if name != "fp32"]
    settings = {"calibration": Wish(faces=35), "max_batch": 64, "keep_rejected": True, "layout": "stacked"}
    return build(run_dir, out, precisions=precisions, **settings, console=quiet)
