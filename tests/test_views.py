import numpy as np
import pytest
import torch
import torch.nn.functional as F

from emoexport.errors import UsageError
from emoexport.views import VIEWS, View, brightness, coinciding, contrast, gamma, rotate, shift, views_named, zoom

ALL = tuple(VIEWS.values())
SIZES = (48, 112, 224)


@pytest.fixture
def pictures(faces):
    return torch.from_numpy(faces[0][:8]).permute(0, 3, 1, 2).double() / 255


def test_there_are_sixteen_and_no_two_are_the_same_function(pictures):
    shown = [view(pictures) for view in VIEWS.values()]
    assert len(shown) == 16
    for first in range(16):
        for second in range(first):
            assert (shown[first] - shown[second]).abs().max() > 1e-3, (list(VIEWS)[first], list(VIEWS)[second])


@pytest.mark.parametrize("name", VIEWS)
def test_views_keep_shape_type_and_range(name, pictures):
    for channels in (1, 3):
        given = pictures.expand(-1, channels, -1, -1)
        shown = VIEWS[name](given)
        assert shown.shape == given.shape
        assert shown.dtype == given.dtype
        assert shown.min() >= 0
        assert shown.max() <= 1


def test_the_set_is_closed_under_flips(pictures):
    """A mirrored face is shown the same pictures in another order."""
    of_face = {name: view(pictures) for name, view in VIEWS.items()}
    of_mirror = {name: view(pictures.flip(-1)) for name, view in VIEWS.items()}
    for name in VIEWS:
        twin = {"identity": "flip", "flip": "identity"}.get(
            name, name.removesuffix("-flipped") if name.endswith("-flipped") else f"{name}-flipped"
        )
        assert torch.equal(of_mirror[name], of_face[twin])


@pytest.mark.parametrize(
    ("view", "theta"),
    [
        (lambda x: shift(x, right=0.1, down=-0.07), [[1, 0, -0.2], [0, 1, 0.14]]),
        (lambda x: zoom(x, factor=1.3), [[1 / 1.3, 0, 0], [0, 1 / 1.3, 0]]),
        (
            lambda x: rotate(x, degrees=11.0),
            [
                [np.cos(np.radians(11)), np.sin(np.radians(11)), 0],
                [-np.sin(np.radians(11)), np.cos(np.radians(11)), 0],
            ],
        ),
    ],
)
def test_sampling_is_that_of_pytorch(view, theta, pictures):
    grid = F.affine_grid(
        torch.tensor([theta], dtype=torch.float64).expand(8, -1, -1), list(pictures.shape), align_corners=False
    )
    wanted = F.grid_sample(pictures, grid, mode="bilinear", padding_mode="border", align_corners=False)
    assert (view(pictures) - wanted).abs().max() < 1e-12


def test_directions():
    dot = torch.zeros(1, 1, 20, 20, dtype=torch.float64)
    dot[0, 0, 4, 10] = 1
    assert shift(dot, right=0.1)[0, 0, 4, 12] == pytest.approx(1)
    assert shift(dot, down=0.2)[0, 0, 8, 10] == pytest.approx(1)
    turned = rotate(dot, degrees=30)[0, 0]
    assert turned[:, 11:].sum() > 0.9  # the top turns to the right: clockwise


def smooth(size: int) -> torch.Tensor:
    """The same smooth picture at any size."""
    centre = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    return (0.5 + 0.3 * torch.sin(5 * centre)[:, None] * torch.cos(7 * centre + 1)[None, :])[None, None]


@pytest.mark.parametrize(("small", "large"), [(48, 112), (48, 224), (112, 224)])
@pytest.mark.parametrize("name", VIEWS)
def test_a_view_means_the_same_at_every_size(name, small, large):
    """Shown and then made smaller, or the other way round, is within 1 of 255 levels, off the repeated border."""

    def smaller(picture: torch.Tensor) -> torch.Tensor:
        return F.interpolate(picture, (small, small), mode="bilinear", antialias=True, align_corners=False)

    difference = smaller(VIEWS[name](smooth(large))) - VIEWS[name](smaller(smooth(large)))
    edge = small // 8  # the views move or turn by less
    assert difference[..., edge:-edge, edge:-edge].abs().max() < 1 / 255


@pytest.mark.parametrize("size", SIZES)
def test_the_set_of_pictures_is_closed_under_flips_at_every_size(size):
    faces = torch.rand(2, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    of_face, of_mirror = ({view(shown).numpy().tobytes() for view in ALL} for shown in (faces, faces.flip(-1)))
    assert of_face == of_mirror
    assert len(of_face) == 16


@pytest.mark.parametrize("shape", [*((size, size, 1) for size in SIZES), (8, 12, 3)], ids=str)
def test_of_the_sixteen_none_coincide(shape):
    assert coinciding(ALL, shape) == tuple(range(16))


NOTHING = [
    View(name="zoom", function=zoom, parameters={"factor": 1.0}),
    View(name="shift", function=shift, parameters={"right": 0.0}),
    View(name="rotate", function=rotate, parameters={"degrees": 0.0}),
    View(name="brightness", function=brightness, parameters={"factor": 1.0}),
    View(name="gamma", function=gamma, parameters={"exponent": 1.0}),
]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("view", NOTHING, ids=lambda view: view.name)
def test_a_row_that_does_nothing_coincides_with_the_identity(view, size):
    assert coinciding([VIEWS["flip"], VIEWS["identity"], view], (size, size, 1)) == (0, 1, 1)


def test_views_coincide_where_they_do_at_this_size():
    near = View(name="near", function=shift, parameters={"right": 0.3 / 48})
    two = View(name="two", function=shift, parameters={"right": 2 / 48})
    assert coinciding([near, two, VIEWS["shift-right"], VIEWS["identity"]], (48, 48, 3)) == (0, 1, 1, 3)
    one_level = View(name="one level", function=lambda faces: torch.where(faces == 77 / 255, 0.0, faces))
    assert coinciding([VIEWS["identity"], one_level], (8, 8, 1)) == (0, 1)


@pytest.mark.parametrize("size", SIZES)
def test_a_shift_by_whole_pixels_mixes_none(size):
    face = torch.rand(1, 1, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(shift(face, right=3 / size, down=5 / size)[..., 5:, 3:], face[..., :-5, :-3])


def test_photometric_values():
    value = torch.full((1, 1, 2, 2), 0.6, dtype=torch.float64)
    assert brightness(value, factor=1.2)[0, 0, 0, 0] == pytest.approx(0.72)
    assert brightness(value, factor=2.0)[0, 0, 0, 0] == 1
    assert contrast(value, factor=1.5)[0, 0, 0, 0] == pytest.approx(0.65)
    assert gamma(value, exponent=0.5)[0, 0, 0, 0] == pytest.approx(0.6**0.5)


def test_rotation_of_a_face_that_is_not_square_keeps_angles():
    wide = torch.zeros(1, 1, 20, 60, dtype=torch.float64)
    wide[0, 0, :, 29:31] = 1  # an upright bar
    turned = rotate(wide, degrees=45.0)[0, 0]
    rows, columns = torch.nonzero(turned > 0.4, as_tuple=True)
    slope = np.polyfit(rows.numpy(), columns.numpy(), 1)[0]
    assert slope == pytest.approx(-1, abs=0.15)


@pytest.mark.parametrize("names", [["identity", "nose"], ["flip", "flip"], []])
def test_names_are_checked(names):
    with pytest.raises(UsageError):
        views_named(names)
