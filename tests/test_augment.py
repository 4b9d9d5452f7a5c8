from dataclasses import asdict

import pytest
import torch

from emoexport.labels import EMOTIONS
from emoexport.train.augment import EYE_LINE, NOSE_LINE, TABLE, FaceAugmentation, erase, turn

LABELS = torch.arange(len(EMOTIONS))


@pytest.fixture(scope="module")
def pictures(faces) -> torch.Tensor:
    """Seven drawn faces, one of each emotion in order, float `(7, 1, 32, 32)`."""
    images, labels = faces
    rows = [int((labels == label).argmax()) for label in range(7)]
    return torch.from_numpy(images[rows]).permute(0, 3, 1, 2).float() / 255


def drawn(augmentation: FaceAugmentation, pictures: torch.Tensor, labels: torch.Tensor, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    return augmentation(pictures, labels)


@pytest.mark.parametrize(("strength", "phase"), [(0.0, 1.0), (1.0, 0.0)])
def test_no_strength_is_no_change(strength, phase, pictures):
    augmentation = FaceAugmentation(strength, emotion_specific=True)
    augmentation.phase = phase
    assert augmentation(pictures, LABELS) is pictures


@pytest.mark.parametrize("size", [16, 33, 48])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("strength", [0.5, 2.0])
def test_any_size_and_colour_stays_a_picture(size, channels, strength):
    torch.manual_seed(1)
    before = torch.rand(70, channels, size, size)
    after = FaceAugmentation(strength, emotion_specific=True)(before, LABELS.repeat(10))
    assert (after.shape, after.dtype) == (before.shape, before.dtype)
    assert float(after.min()) >= 0
    assert float(after.max()) <= 1
    assert ((after - before).abs().amax(dim=(1, 2, 3)) > 0.01).all()


def test_a_seed_repeats_it_and_every_face_is_drawn_for(pictures):
    augmentation = FaceAugmentation(1.0, emotion_specific=True)
    once = drawn(augmentation, pictures, LABELS)
    assert torch.equal(once, drawn(augmentation, pictures, LABELS))
    assert not torch.equal(once, drawn(augmentation, pictures, LABELS, seed=1))
    alike = drawn(augmentation, pictures[:1].expand(8, -1, -1, -1), LABELS[:1].expand(8))
    assert len({row.numpy().tobytes() for row in alike}) == 8


@pytest.mark.parametrize("channels", [1, 3])
def test_a_face_does_not_depend_on_its_neighbours(channels, pictures):
    before = pictures.expand(-1, channels, -1, -1)
    others = torch.cat([before[:1], torch.ones_like(before[1:])])
    augmentation = FaceAugmentation(1.0, emotion_specific=True)
    assert torch.equal(drawn(augmentation, before, LABELS)[0], drawn(augmentation, others, LABELS)[0])


def test_phases_scale_the_strength(pictures):
    symmetric = (pictures + pictures.flip(-1)).repeat(20, 1, 1, 1) / 2  # mirroring does not scale
    augmentation = FaceAugmentation(1.0, emotion_specific=False)
    changes = []
    for phase in (0.2, 0.6, 1.0):
        augmentation.phase = phase
        changes.append(float((drawn(augmentation, symmetric, LABELS.repeat(20)) - symmetric).abs().mean()))
    assert changes[0] < 0.7 * changes[1] < 0.7 * changes[2]
    half = drawn(FaceAugmentation(0.5, emotion_specific=False), pictures, LABELS)
    augmentation.phase = 0.5
    assert torch.equal(drawn(augmentation, pictures, LABELS), half)


def test_only_the_specific_one_looks_at_labels(pictures):
    for specific in (True, False):
        augmentation = FaceAugmentation(1.0, emotion_specific=specific)
        same = torch.equal(drawn(augmentation, pictures, LABELS), drawn(augmentation, pictures, LABELS.flip(0)))
        assert same is not specific


def test_the_table_has_every_emotion_and_a_reason_for_it():
    assert tuple(TABLE) == EMOTIONS
    for row in TABLE.values():
        values = asdict(row)
        assert len(values.pop("reason")) > 20
        assert all(0 < value < 2 for value in values.values())
    assert TABLE["happy"].erase_eyes > 1 > TABLE["angry"].erase_eyes
    assert not FaceAugmentation(1.0, emotion_specific=True).state_dict()


def spot(size: int, x: float, y: float) -> torch.Tensor:
    """A soft bright spot at fractions of the face, `(1, 1, size, size)`."""
    at = (torch.arange(size) + 0.5) / size
    return torch.exp(-((at[None, :] - x) ** 2 + (at[:, None] - y) ** 2) / 0.005)[None, None]


def middle_of(pictures: torch.Tensor) -> tuple[float, float]:
    """Where the brightness of one face is centred, as fractions to the right and down."""
    at = (torch.arange(pictures.shape[-1]) + 0.5) / pictures.shape[-1]
    mass = pictures[0, 0] / pictures.sum()
    return float((mass.sum(dim=0) * at).sum()), float((mass.sum(dim=1) * at).sum())


def moved(pictures, *, degrees=0.0, factor=1.0, shift=(0.0, 0.0)):
    return turn(
        pictures, degrees=torch.tensor([degrees]), factor=torch.tensor([factor]), shift=torch.tensor([list(shift)])
    )


@pytest.mark.parametrize("size", [32, 48, 97])
@pytest.mark.parametrize(("degrees", "factor"), [(25.0, 1.0), (-40.0, 1.0), (0.0, 1.3), (15.0, 0.8)])
def test_the_middle_of_the_eye_line_stays(size, degrees, factor):
    after = moved(spot(size, 0.5, EYE_LINE), degrees=degrees, factor=factor)
    assert middle_of(after) == pytest.approx((0.5, EYE_LINE), abs=0.003)


def test_turning_is_clockwise_and_shifts_are_fractions():
    x, y = middle_of(moved(spot(48, 0.7, EYE_LINE), degrees=30.0))
    assert (x, y) == pytest.approx((0.5 + 0.2 * 0.866, EYE_LINE + 0.2 * 0.5), abs=0.005)
    assert middle_of(moved(spot(48, 0.5, 0.5), shift=(0.125, -0.25))) == pytest.approx((0.625, 0.25), abs=0.003)
    still = spot(48, 0.3, 0.6)
    assert torch.allclose(moved(still), still, atol=1e-5)


@pytest.mark.parametrize("size", [20, 48])
@pytest.mark.parametrize("largest", [0.05, 0.15, 0.9])
def test_eyes_and_mouth_are_never_both_erased(size, largest):
    torch.manual_seed(2)
    before = (torch.rand(3000, 1, size, size) < 0.5).float()
    area = torch.full((3000,), largest)
    changed = (erase(before, eyes=area, mouth=area, share=0.3) != before)[:, 0]
    rows, columns = changed.any(dim=2), changed.any(dim=1)
    upper = (torch.arange(size) + 0.5) / size < NOSE_LINE
    eyes, mouth = rows[:, upper].any(dim=1), rows[:, ~upper].any(dim=1)
    assert not (eyes & mouth).any()
    assert eyes.float().mean() == pytest.approx(0.15, abs=0.03)
    assert mouth.float().mean() == pytest.approx(0.15, abs=0.03)
    # A box of area a covers at most sqrt(a) + 1 pixels more than a in either direction.
    boxes = rows.sum(dim=1) * columns.sum(dim=1)
    assert int(boxes.max()) <= largest * size**2 + 3 * size
    assert boxes[eyes].float().mean() > 0.3 * largest * size**2 * min(1, NOSE_LINE / largest)


def test_an_amount_of_zero_erases_nothing_there():
    torch.manual_seed(3)
    before = torch.rand(500, 3, 32, 32)
    none, some = torch.zeros(500), torch.full((500,), 0.2)
    changed = (erase(before, eyes=none, mouth=some, share=1.0) != before).any(dim=3).any(dim=1)
    assert not changed[:, : int(NOSE_LINE * 32)].any()
    assert changed.any(dim=1).float().mean() == pytest.approx(0.5, abs=0.08)


def test_half_of_the_faces_are_mirrored_whatever_the_strength():
    before = torch.cat([torch.zeros(400, 1, 16, 8), torch.ones(400, 1, 16, 8)], dim=3)
    after = drawn(FaceAugmentation(0.01, emotion_specific=True), before, torch.zeros(400, dtype=torch.int64))
    mirrored = after[..., :8].mean(dim=(1, 2, 3)) > after[..., 8:].mean(dim=(1, 2, 3))
    assert mirrored.float().mean() == pytest.approx(0.5, abs=0.08)


def test_grey_faces_in_three_channels_stay_grey(pictures):
    after = drawn(FaceAugmentation(1.0, emotion_specific=True), pictures.expand(-1, 3, -1, -1), LABELS)
    assert torch.allclose(after, after[:, :1].expand(-1, 3, -1, -1), atol=1e-5)
