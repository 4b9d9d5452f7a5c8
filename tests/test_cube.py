import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from emoexport import cli, cube, opening, passes, sessions
from emoexport.cube import CUBE_FILE, Cube, CubeRequest, compute_cube
from emoexport.decision import Decision
from emoexport.engines import BACKENDS
from emoexport.engines.base import Engine
from emoexport.errors import BadBundle, BadInput, CheckFailed, DiskFull, UsageError
from emoexport.files import unfinished_directory
from emoexport.reference import Reference
from emoexport.scoring import score_split

SHAPE = (70, 2, 3, 7)
REQUEST = CubeRequest(
    data="drawn",
    split="test",
    faces=70,
    data_sha256="d" * 64,
    label_counts={"angry": 70},
    members=("a" * 64, "b" * 64),
    views=("identity", "flip", "zoom"),
    labels=("angry", "disgust", "fear", "happy", "sad", "surprise", "neutral"),
    engine="torch",
    precision="fp32",
    bundle_digest="e" * 64,
)


def softmax_of(faces: np.ndarray) -> np.ndarray:
    """Some probabilities of every pass that depend on the face alone, float32 `(n, 2, 3, 7)`."""
    seeds = faces.reshape(len(faces), -1)[:, :42].astype(np.float64) / 40
    powers = np.exp(seeds.reshape(-1, 2, 3, 7))
    return (powers / powers.sum(axis=-1, keepdims=True)).astype(np.float32)


class Scorer:
    """Counts the faces that it scores, and fails after some batches."""

    def __init__(self, fail_after: int | None = None, error: BaseException | None = None) -> None:
        self.left, self.error, self.batches = fail_after, error or KeyboardInterrupt(), []

    def __call__(self, faces: np.ndarray) -> np.ndarray:
        if self.left == len(self.batches):
            raise self.error
        self.batches.append(len(faces))
        return softmax_of(faces)


@pytest.fixture
def compute(faces, tmp_path):
    """Compute the cube of the drawn faces at `tmp_path / "cube"`, in batches of 16: five of them."""

    def call(score=softmax_of, *, out: Path = tmp_path / "cube", request: CubeRequest = REQUEST, **settings) -> Cube:
        return compute_cube(score, *faces, out, request, **{"batch_size": 16} | settings)

    return call


@pytest.fixture(scope="module")
def reference(bundle) -> Reference:
    return sessions.open_reference(bundle)[0]


@pytest.fixture(scope="module")
def scored(bundle, reference, faces, tmp_path_factory) -> Cube:
    """The cube of the bundle's members on the drawn faces."""
    views = tuple(view.name for view in bundle.manifest.views)
    members = tuple(member.sha256 for member in bundle.manifest.members)
    request = REQUEST.model_copy(update={"views": views, "members": members})
    return compute_cube(reference.scores, *faces, tmp_path_factory.mktemp("cubes") / "x", request, batch_size=16)


def test_the_vote_is_that_of_the_reference_and_of_the_fold(scored, bundle, reference, faces):
    found = bundle.manifest.decision.decide(scored.vote())
    fold = opening.open_engines(bundle, engines=["onnxruntime"], precisions=["fp32"])[0].run_all(faces[0])
    for wanted in (reference.run(faces[0]), fold):
        assert np.abs(found.probabilities - wanted.probabilities).max() < 1e-5
        assert np.array_equal(found.label, wanted.label)


def test_scores_are_those_of_every_pass_mapped_and_read_only(scored, reference, faces):
    assert isinstance(scored.scores, np.memmap)
    assert scored.scores.dtype == np.float32
    assert scored.scores.shape == (70, 2, 16, 7) == scored.record.shape
    assert np.abs(scored.scores - reference.scores(faces[0])).max() < 1e-6
    assert scored.labels.dtype == np.int64
    assert np.array_equal(scored.labels, faces[1])
    for array in (scored.scores, scored.labels):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0
    assert sorted(path.name for path in scored.path.iterdir()) == ["cube.json", "labels.npy", "scores.npy"]


@pytest.mark.parametrize("at_once", [1, 1000, 4_000_000])
def test_votes_of_subsets_and_weights_are_weighted_means(at_once, scored, monkeypatch):
    monkeypatch.setattr(passes, "_SCORES_AT_ONCE", at_once)
    scores = np.asarray(scored.scores, dtype=np.float64)
    weights = np.random.default_rng(0).random((2, 16))
    weights[0, 3] = 0
    cases = [
        ({}, scores.mean(axis=(1, 2))),
        ({"members": [1]}, scores[:, 1].mean(axis=1)),
        ({"views": [0, 5]}, scores[:, :, [0, 5]].mean(axis=(1, 2))),
        ({"members": [0], "views": [7]}, scores[:, 0, 7]),
        ({"views": [5, 0, 5]}, scores[:, :, [0, 5]].mean(axis=(1, 2))),
        ({"weights": weights}, np.einsum("nkvl,kv->nl", scores, weights / weights.sum())),
        ({"weights": weights, "members": [1]}, np.einsum("nvl,v->nl", scores[:, 1], weights[1] / weights[1].sum())),
    ]
    for chosen, wanted in cases:
        found = scored.vote(**chosen)
        assert found.dtype == np.float64
        assert np.abs(found - wanted).max() < 1e-12, chosen
    assert np.array_equal(scored.pass_labels(), scores.argmax(axis=-1))
    assert scored.weights == pytest.approx(np.full((2, 16), 1 / 32))


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        ({"members": [2]}, "there is no member 2; there are 2"),
        ({"views": [-1]}, "there is no view -1; there are 16"),
        ({"members": []}, "no pass is chosen"),
        ({"weights": np.zeros((2, 16))}, "the weight 0"),
        ({"weights": -np.ones((2, 16))}, r"from -1 to -1; needed are finite ones of the shape \(2, 16\), 0 or more"),
        ({"weights": np.full((2, 16), np.nan)}, "needed are finite ones"),
        ({"weights": np.ones((2, 15))}, r"weights of the shape \(2, 15\)"),
    ],
)
def test_votes_that_make_no_sense_are_refused(chosen, said, scored):
    with pytest.raises(UsageError, match=said):
        scored.vote(**chosen)


def test_accuracies_are_those_counted_by_hand(scored, rules):
    mask = np.arange(70) % 3 > 0
    found = scored.accuracy(rules, mask, rows="clean")
    assert (found.rows, found.vote.n, found.best_pass.n) == ("clean", mask.sum(), mask.sum())
    right = scored.scores.argmax(axis=-1)[mask] == scored.labels[mask][:, None, None]
    assert found.best_pass.value == pytest.approx(right.mean(axis=0).max(), abs=1e-6)
    view = scored.record.views.index(found.view)
    assert right[:, found.member, view].mean() == right.mean(axis=0).max()
    decided = rules.decide(scored.vote()).label == scored.labels
    assert found.vote.value == pytest.approx(decided[mask].mean(), abs=1e-6)
    assert found.vote.low < found.vote.value < found.vote.high


def test_what_was_computed_before_a_stop_is_not_computed_again(compute, tmp_path):
    whole = compute(out=tmp_path / "whole")
    cut_off, rest, seen, said = Scorer(fail_after=3), Scorer(), [], []
    with pytest.raises(KeyboardInterrupt):
        compute(cut_off)
    assert not (tmp_path / "cube").exists()
    assert cut_off.batches == [16, 16, 16]
    found = compute(rest, progress=seen.append, note=said.append)
    assert rest.batches == [16, 6]
    assert seen == [48, 16, 6]
    assert "going on after 48 of 70 faces" in said[0]
    for name in ("scores.npy", "labels.npy"):
        assert (found.path / name).read_bytes() == (whole.path / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cube", "whole"]


def test_a_kill_leaves_nothing_at_its_place_and_costs_one_batch(compute, faces, tmp_path):
    np.savez(tmp_path / "faces.npz", *faces)
    (tmp_path / "request.json").write_text(REQUEST.to_json())
    script = (
        "import os, signal, sys\nfrom pathlib import Path\nimport numpy as np\n"
        "from emoexport.cube import CubeRequest, compute_cube\n"
        "here = Path(sys.argv[1])\nfaces, labels = np.load(here / 'faces.npz').values()\n"
        "request = CubeRequest.parse_json(here / 'request.json')\ndone = []\n"
        "def score(batch):\n"
        "    if len(done) == 2:\n        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    done.append(batch)\n    return np.full((len(batch), 2, 3, 7), 1 / 7, dtype=np.float32)\n"
        "compute_cube(score, faces, labels, here / 'cube', request, batch_size=16)\n"
    )
    killed = subprocess.run([sys.executable, "-c", script, tmp_path], timeout=60, check=False)
    assert killed.returncode == -9
    assert not (tmp_path / "cube").exists()
    rest = Scorer()
    found = compute(rest)
    assert rest.batches == [16, 16, 6]
    assert np.allclose(found.scores[:32], 1 / 7)
    assert np.array_equal(found.scores[32:], softmax_of(faces[0][32:]))


def test_a_stop_at_the_very_end_computes_nothing_again(compute, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(cube, "move_directory", stop)
        with pytest.raises(KeyboardInterrupt):
            compute()
    rest = Scorer()
    assert compute(rest).record.shape == SHAPE
    assert rest.batches == []


def test_a_cube_that_is_there_is_not_computed_again(compute):
    first = compute()
    score, said = Scorer(), []
    assert compute(score, note=said.append).record == first.record
    assert score.batches == []
    assert "holds this cube already" in said[0]
    assert compute(score, force=True).record.scores_sha256 == first.record.scores_sha256
    assert sum(score.batches) == 70


OTHERS = [
    ({"data": "faces.csv", "data_sha256": "f" * 64}, "data = drawn; this call has faces.csv"),
    ({"data_sha256": "f" * 64}, f"data_sha256 = {'d' * 64}; this call has ffff"),
    ({"members": ("a" * 64, "c" * 64)}, rf"members\[1\] = {'b' * 64}; this call has cccc"),
    ({"members": ("a" * 64,)}, "number of members = 2; this call has 1"),
    ({"views": ("identity", "zoom", "flip")}, r"views\[1\] = flip; this call has zoom"),
    ({"member_weights": (1.0, 2.0)}, "number of member_weights = 0; this call has 2"),
    ({"engine": "openvino"}, "engine = torch; this call has openvino"),
    ({"precision": "fp16", "bundle_digest": "0" * 64}, "precision = fp32; this call has fp16"),
    ({"bundle_digest": "0" * 64}, "bundle_digest = eeee"),
]


@pytest.mark.parametrize(("update", "said"), OTHERS, ids=["-".join(row[0]) for row in OTHERS])
def test_another_request_is_refused_with_the_first_difference(update, said, compute, tmp_path):
    other = REQUEST.model_copy(update=update)
    with pytest.raises(KeyboardInterrupt):
        compute(Scorer(fail_after=1))
    with pytest.raises(UsageError, match=f"was begun with {said}") as caught:
        compute(request=other)
    assert "--force" in caught.value.hint
    compute()
    with pytest.raises(UsageError, match=f"was computed with {said}"):
        compute(request=other)
    shape = (2, len(other.members), len(other.views), 7)
    with pytest.raises(KeyboardInterrupt):
        compute(Scorer(fail_after=0), request=other, force=True)
    assert Cube.open(tmp_path / "cube").record.members == REQUEST.members
    forced = compute(lambda batch: np.full((len(batch), *shape[1:]), 1 / 7, np.float32), request=other, force=True)
    assert CubeRequest(**forced.record.model_dump(include=set(CubeRequest.model_fields))) == other


def test_another_name_of_the_same_faces_is_no_difference(compute):
    with pytest.raises(KeyboardInterrupt):
        compute(Scorer(fail_after=1))
    assert compute(request=REQUEST.model_copy(update={"data": "copy", "split": "other"})).record.data == "copy"


def test_what_another_command_keeps_there_is_not_touched(compute, tmp_path):
    kept = unfinished_directory(tmp_path / "cube")
    kept.mkdir()
    (kept / "request.json").write_text("{}")
    for force in (False, True):
        with pytest.raises(UsageError, match="holds other files"):
            compute(force=force)
    assert [path.name for path in kept.iterdir()] == ["request.json"]


def test_the_unfinished_array_is_checked(compute, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        compute(Scorer(fail_after=1))
    path = unfinished_directory(tmp_path / "cube") / "scores.npy"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(BadBundle, match=r"scores\.npy cannot be read as an array") as caught:
        compute()
    assert "--force" in caught.value.hint
    assert compute(force=True).record.shape == SHAPE


def test_a_full_disk_is_told_before_anything_is_computed(compute, tmp_path, monkeypatch):
    if not hasattr(os, "posix_fallocate"):
        pytest.skip("space cannot be reserved here")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    score = Scorer()
    with monkeypatch.context() as patched:
        patched.setattr(os, "posix_fallocate", full)
        with pytest.raises(DiskFull, match="cube could not be written, as its disk is full"):
            compute(score)
    assert score.batches == []
    assert compute(score).record.shape == SHAPE


def spoilt(value: float) -> np.ndarray:
    scores = np.full((16, 2, 3, 7), 1 / 7, dtype=np.float32)
    scores[4, 1, 2, 0] = value
    return scores


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (spoilt(np.nan), "the scores of face 5, member 2, view zoom are nan"),
        (spoilt(np.inf), "are inf"),
        (spoilt(0.5), "needed are probabilities that sum to 1"),
        (spoilt(-0.2), "are -0.2"),
        (softmax_of(np.zeros((16, 32, 32, 1), np.uint8))[:, :1], r"shape \(16, 1, 3, 7\); needed are float32"),
        (softmax_of(np.zeros((16, 32, 32, 1), np.uint8)).astype(np.float16), "answered float16 scores"),
    ],
)
def test_what_is_no_probability_is_refused_and_not_kept(answer, said, compute, tmp_path):
    with pytest.raises(CheckFailed, match=said):
        compute(lambda _: answer)
    assert not (tmp_path / "cube").exists()
    rest = Scorer()
    compute(rest)
    assert sum(rest.batches) == 70


def test_faces_and_request_must_agree(faces, tmp_path):
    for some in (faces[0][:69], faces[0]):
        with pytest.raises(BadInput, match="labels; the request says 70"):
            compute_cube(softmax_of, some, faces[1][:69], tmp_path / "cube", REQUEST)
    assert list(tmp_path.iterdir()) == []


def swap_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def reshape(path: Path) -> None:
    np.save(path, np.load(path).reshape(1, -1))


def edit(path: Path) -> None:
    path.write_text(path.read_text().replace('"engine": "torch"', '"engine": "onnxruntime"'))


DAMAGE = [
    ("scores.npy", swap_byte, "its SHA-256 is another"),
    ("scores.npy", reshape, r"holds float32 \(1, 2940\); needed is float32 \(70, 2, 3, 7\)"),
    ("scores.npy", lambda path: path.write_bytes(path.read_bytes()[:-4]), "cannot be read as an array"),
    ("scores.npy", lambda path: path.write_bytes(b""), "cannot be read as an array"),
    ("scores.npy", lambda path: np.save(path, np.array([{}]), allow_pickle=True), "cannot be read as an array"),
    ("scores.npy", Path.unlink, "is missing"),
    ("labels.npy", swap_byte, "its SHA-256 is another"),
    ("labels.npy", Path.unlink, "is missing"),
    ("cube.json", edit, "was changed after it was written"),
    ("cube.json", lambda path: path.write_text("{"), "cube.json"),
    ("cube.json", lambda path: path.write_text("{}"), "Field required"),
    ("cube.json", Path.unlink, "is no score cube: there is no cube.json"),
]


@pytest.mark.parametrize(("name", "damage", "said"), DAMAGE)
def test_a_damaged_cube_is_refused(name, damage, said, compute):
    found = compute()
    damage(found.path / name)
    with pytest.raises(BadBundle, match=said) as caught:
        Cube.open(found.path)
    assert caught.value.exit_code == 4


def test_opening_a_cube_loads_no_torch():
    script = "import sys\nimport emoexport.cube\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("backend", [name for name, row in BACKENDS.items() if row.takes("fp16")])
def test_any_engine_computes_a_cube_in_calls_that_it_takes(backend, bundle, quiet, tmp_path, monkeypatch):
    if not BACKENDS[backend].is_usable():
        pytest.skip(f"{backend} is not installed")
    honest, asked, answered = Engine.scores, [], []

    def scores(self: Engine, faces: np.ndarray) -> np.ndarray:
        asked.append((self.name, len(faces)))
        answered.append(honest(self, faces))
        return answered[-1]

    monkeypatch.setattr(Engine, "scores", scores)
    found, *_ = score_split(
        bundle, tmp_path / "x", engine=backend, precision="fp16", limit=70, batch=1000, console=quiet
    )
    assert asked == [(f"{backend}-fp16", 64), (f"{backend}-fp16", 6)]
    assert (found.record.engine, found.record.precision) == (backend, "fp16")
    assert np.array_equal(found.scores, np.concatenate(answered))


def test_the_torch_engine_refuses_what_is_no_face(reference):
    from emoexport.engines.torch_engine import TorchEngine

    engine = TorchEngine(reference, face_shape=(32, 32, 1), max_batch=4)
    with pytest.raises(BadInput, match="needed are uint8 faces"):
        engine.scores(np.zeros((5, 32, 32, 1), np.uint8))
    assert engine.scores(np.zeros((4, 32, 32, 1), np.uint8)).shape == (4, 2, 16, 7)


def command(*arguments: object) -> tuple[int, str, str]:
    done = CliRunner().invoke(cli.app, ["cube", *map(str, arguments)])
    return done.exit_code, done.stdout, done.stderr


def test_the_command_says_what_it_made(bundle, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = command(bundle.path, "--limit", "40", "--batch", "16")
    assert code == 0, err
    found = Cube.open(Path("cubes/tiny-test-torch-fp32"))
    assert found.record.shape == (40, 2, 16, 7)
    assert sum(found.record.label_counts.values()) == 40
    assert found.record.bundle_digest == bundle.manifest.digest
    vote = found.accuracy(bundle.manifest.decision, np.ones(40, dtype=bool)).vote
    for wanted in (
        "cube: cubes/tiny-test-torch-fp32",
        "shape: 40 x 2 x 16 x 7 (faces, members, views, emotions), float32, 0.0 MB",
        f"digest: {found.record.digest}",
        f"{100 * vote.value:.1f} [{100 * vote.low:.1f}, {100 * vote.high:.1f}]",
    ):
        assert wanted in out
    code, out, err = command(bundle.path, "--limit", "40")
    assert code == 0, err
    assert "holds this cube already" in out
    code, _, err = command(bundle.path, "--limit", "30")
    assert code == 2
    assert "was computed with faces = 40; this call has 30" in err
    code, _, err = command(bundle.path, "--limit", "30", "--force")
    assert code == 0, err


def test_the_command_resumes_and_tells_damage_by_its_exit_code(bundle, tmp_path, monkeypatch):
    from emoexport.engines.torch_engine import TorchEngine

    honest, calls, out = TorchEngine.scores, [], tmp_path / "x"

    def stop(self, faces):
        calls.append(len(faces))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return honest(self, faces)

    def broken(self, faces):
        return honest(self, faces) * np.float32(np.nan)

    arguments = (bundle.path, "--limit", "40", "--batch", "16", "--split", "validation", "-o", out)
    monkeypatch.setattr(TorchEngine, "scores", stop)
    assert command(*arguments)[0] == 130
    assert not out.exists()
    monkeypatch.setattr(TorchEngine, "scores", broken)
    code, _, err = command(*arguments)
    assert code == 1
    assert "the scores of face 17, member 1, view identity are nan" in err
    monkeypatch.setattr(TorchEngine, "scores", honest)
    code, printed, err = command(*arguments)
    assert code == 0, err
    assert "going on after 16 of 40 faces" in printed
    assert "its accuracy says nothing of new faces" in printed
    swap_byte(out / "labels.npy")
    code, _, err = command(*arguments)
    assert code == 4
    assert "labels.npy was changed after it was written" in err
    assert "--force" in err
    shutil.rmtree(out)
    out.write_text("a file")
    assert command(*arguments)[0] == 2


def test_the_record_is_plain_json(scored):
    record = json.loads((scored.path / CUBE_FILE).read_text())
    assert record["engine"] == "torch"
    assert record["views"] == list(scored.record.views)
    assert Decision(labels=tuple(record["labels"])).labels == scored.record.labels
