"""Pictures and masks around the painting: same transforms, exact pixels where nothing was asked for."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from services.diffusion.domain import Outpaint, Pixels
from services.diffusion.engine import imaging
from services.kit.faults import Fault, Kind


def noise(width: int, height: int, seed: int = 1) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def scene(width: int, height: int) -> Image.Image:
    """A smooth picture: red grows to the right, green downwards."""
    across, down = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.dstack([across, down, np.full_like(across, 90)]).astype(np.uint8))


def mask_of(width: int, height: int, *boxes: tuple[int, int, int, int]) -> Image.Image:
    mask = Image.new("L", (width, height), 0)
    for box in boxes:
        mask.paste(255, box)
    return mask


def array(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def test_pixels_become_the_same_picture() -> None:
    picture = noise(7, 5)
    assert imaging.to_image(Pixels(7, 5, "RGB", picture.tobytes())).tobytes() == picture.tobytes()
    mask = imaging.to_image(Pixels(3, 1, "L", bytes([0, 9, 255])))
    assert (mask.mode, mask.size, mask.tobytes()) == ("L", (3, 1), bytes([0, 9, 255]))


def test_fitting_to_the_own_size_changes_nothing() -> None:
    picture = noise(40, 24)
    assert imaging.fit(picture, 40, 24).tobytes() == picture.tobytes()


def test_fitting_covers_and_cuts_off_evenly() -> None:
    picture = Image.new("RGB", (90, 30), "red")
    picture.paste("blue", (30, 0, 60, 30))  # the middle third is all that a square keeps
    fitted = array(imaging.fit(picture, 60, 60))
    assert (fitted[:, 8:-8] == (0, 0, 255)).all()  # the filter reaches a little into the red
    assert np.abs(fitted - fitted[:, ::-1]).max() <= 1


def test_a_mask_stays_over_what_it_covers_when_both_are_fitted() -> None:
    box = (50, 10, 70, 35)
    picture = Image.new("RGB", (120, 50), "black")
    picture.paste("white", box)
    fitted, mask = imaging.fit(picture, 64, 64), imaging.fit(mask_of(120, 50, box), 64, 64)
    assert np.abs(array(fitted)[..., 0] - array(mask)).max() < 60  # the filters differ at the edge only
    assert (array(mask) >= 128).sum() == (array(fitted)[..., 0] >= 128).sum()


def test_fitting_a_mask_adds_no_specks_around_it() -> None:
    mask = array(imaging.fit(mask_of(50, 50, (20, 20, 30, 30)), 128, 128))
    assert mask[:46].max() == mask[:, :46].max() == 0


def test_a_blurred_mask_is_soft_at_its_edge_and_nowhere_else() -> None:
    mask = mask_of(100, 20, (50, 0, 100, 20))
    soft = array(imaging.prepare_mask(mask, 4, inverted=False))[10]
    assert (soft[:30] == 0).all()
    assert (soft[70:] == 255).all()
    assert (np.diff(soft) >= 0).all()
    # A Gaussian's step: half way at the edge, 16 % one deviation outside.
    assert (soft[49] + soft[50]) / 510 == pytest.approx(0.5, abs=0.02)
    assert (soft[45] + soft[46]) / 510 == pytest.approx(0.16, abs=0.03)


def test_an_inverted_mask_is_its_negative() -> None:
    mask = mask_of(16, 16, (0, 0, 8, 16))
    assert (array(imaging.prepare_mask(mask, 0, inverted=True)) == 255 - array(mask)).all()
    assert imaging.prepare_mask(mask, 0, inverted=False).tobytes() == mask.tobytes()


def test_every_latent_cell_with_something_to_repaint_is_repainted() -> None:
    mask = mask_of(64, 32, (13, 3, 14, 4))  # one pixel, where a pipeline's own look would miss it
    mask.putpixel((40, 20), 127)
    hard = array(imaging.hard_mask(mask, 8))
    assert (hard[0:8, 8:16] == 255).all()
    assert hard.sum() == 255 * 64


def test_a_mask_of_whole_cells_is_left_as_it_is() -> None:
    mask = mask_of(64, 32, (8, 16, 40, 24))
    assert imaging.hard_mask(mask, 8).tobytes() == mask.tobytes()


def test_a_mask_that_softening_has_eaten_up_is_refused() -> None:
    soft = imaging.prepare_mask(mask_of(64, 64, (30, 30, 32, 32)), 8, inverted=False)
    with pytest.raises(Fault) as caught:
        imaging.hard_mask(soft, 8)
    assert (caught.value.data.kind, caught.value.data.reason) == (Kind.INVALID_ARGUMENT, "MASK_EMPTY")
    assert [violation.field for violation in caught.value.data.fields] == ["inpaint.mask"]
    with pytest.raises(Fault) as caught:
        imaging.crop_region(
            imaging.prepare_mask(mask_of(400, 400, (200, 200, 201, 201)), 64, inverted=False), 0, 64, 64
        )
    assert caught.value.data.reason == "MASK_EMPTY"


# --- cutting out and putting back ---


def test_a_region_is_the_mask_and_its_padding_in_the_callers_proportions() -> None:
    mask = mask_of(400, 300, (200, 100, 240, 120))
    assert imaging.crop_region(mask, 10, 512, 512) == (190, 80, 250, 140)
    assert imaging.crop_region(mask, 10, 1024, 512) == (180, 90, 260, 130)


def test_a_region_at_a_corner_is_moved_into_the_picture() -> None:
    assert imaging.crop_region(mask_of(400, 300, (0, 0, 40, 10)), 0, 64, 64) == (0, 0, 40, 40)
    assert imaging.crop_region(mask_of(400, 300, (390, 200, 400, 300)), 20, 64, 64) == (280, 180, 400, 300)


def test_a_region_reaches_beyond_a_picture_that_is_too_narrow_for_it() -> None:
    assert imaging.crop_region(mask_of(60, 400, (10, 100, 20, 300)), 0, 64, 64) == (-70, 100, 130, 300)


@given(data=st.data())
def test_a_region_holds_the_mask_and_has_the_proportions(data: st.DataObject) -> None:
    width, height = data.draw(st.integers(1, 300)), data.draw(st.integers(1, 300))
    x, y = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    bounds = (x, y, data.draw(st.integers(x + 1, width)), data.draw(st.integers(y + 1, height)))
    columns, rows = data.draw(st.sampled_from([(64, 64), (128, 64), (64, 512), (72, 40)]))
    padding = data.draw(st.integers(0, 100))
    left, top, right, bottom = imaging.crop_region(mask_of(width, height, bounds), padding, columns, rows)
    assert left <= bounds[0]
    assert top <= bounds[1]
    assert right >= bounds[2]
    assert bottom >= bounds[3]
    # One side is exact, the other is rounded up to a pixel.
    assert (right - left) * rows == pytest.approx((bottom - top) * columns, abs=max(rows, columns))
    for low, high, most in ((left, right, width), (top, bottom, height)):
        assert (low >= 0 and high <= most) or (low <= 0 and high >= most)


@pytest.mark.parametrize("size", [(60, 400), (400, 60), (200, 200)])
def test_what_is_cut_out_comes_back_to_its_place(size: tuple[int, int]) -> None:
    picture = scene(*size)
    middle = (size[0] // 2, size[1] // 2)
    mask = mask_of(*size, (middle[0] - 25, middle[1] - 25, middle[0] + 25, middle[1] + 25))
    mask.paste(255, (middle[0] - 5, 5, middle[0] + 5, size[1] - 5))
    box = imaging.crop_region(mask, 4, 256, 128)
    cut = imaging.cut(picture, box, 256, 128)
    assert cut.size == (256, 128)
    back = imaging.paste_back(picture, cut, mask, box)
    assert np.abs(array(back) - array(picture)).max() <= 4


def test_a_region_beyond_the_edge_shows_the_picture_mirrored() -> None:
    picture = scene(60, 200)
    cut = array(imaging.cut(picture, (-70, 0, 130, 200), 200, 200))
    assert (cut[:, 70:130] == array(picture)).all()
    assert (cut[:, 69] == cut[:, 70]).all()
    assert (cut[:, 40] == cut[:, 99]).all()


@pytest.mark.parametrize("box", [None, (20, 10, 60, 50), (-10, -10, 80, 80)])
def test_unmasked_pixels_stay_exactly_the_originals(box: imaging.Box | None) -> None:
    original, painted = noise(72, 64, 1), noise(72, 64, 2)
    mask = imaging.prepare_mask(mask_of(72, 64, (30, 20, 50, 40)), 2, inverted=False)
    result = array(imaging.paste_back(original, painted, mask, box))
    outside, inside = array(mask) == 0, array(mask) == 255
    assert outside.sum() > 2000
    assert inside.sum() > 50
    assert (result[outside] == array(original)[outside]).all()
    assert (result[inside] != array(original)[inside]).mean() > 0.9
    if box is None:
        assert (result[inside] == array(painted)[inside]).all()
        soft = ~outside & ~inside
        low, high = np.minimum(array(original), array(painted)), np.maximum(array(original), array(painted))
        assert ((result >= low) & (result <= high))[soft].all()


# --- filling ---


def test_the_original_stays_as_it_is() -> None:
    picture = noise(32, 32)
    assert imaging.fill(picture, mask_of(32, 32, (8, 8, 24, 24)), "original", 1).tobytes() == picture.tobytes()


def test_grey_is_middle_grey_under_the_mask_only() -> None:
    picture = noise(32, 32)
    filled = array(imaging.fill(picture, mask_of(32, 32, (8, 8, 24, 24)), "grey", 1))
    assert (filled[8:24, 8:24] == 128).all()
    filled[8:24, 8:24] = array(picture)[8:24, 8:24]
    assert (filled == array(picture)).all()


def test_noise_is_the_seeds_own() -> None:
    picture, mask = Image.new("RGB", (64, 64), "white"), mask_of(64, 64, (0, 0, 64, 32))
    one, again, other = (imaging.fill(picture, mask, "noise", seed) for seed in (2**32 - 1, 2**32 - 1, 5))
    assert one.tobytes() == again.tobytes()
    assert one.tobytes() != other.tobytes()
    top, bottom = array(one)[:32], array(one)[32:]
    assert (bottom == 255).all()
    assert top.mean() == pytest.approx(127.5, abs=4)
    assert top.std() == pytest.approx(73.6, abs=4)


def test_surroundings_go_over_the_hole_smoothly() -> None:
    picture = scene(96, 80)
    holed = picture.copy()
    holed.paste("blue", (20, 20, 70, 60))
    filled = array(imaging.fill(holed, mask_of(96, 80, (20, 20, 70, 60)), "surroundings", 1))
    assert np.abs(filled - array(picture)).max() < 45
    assert np.abs(filled[20:60, 20:70] - array(picture)[20:60, 20:70]).mean() < 12
    assert (filled[:20] == array(picture)[:20]).all()
    steps = np.abs(np.diff(filled, axis=1))[20:60, 18:70]
    assert steps.max() < 20  # no visible seam


def test_surroundings_reach_every_corner_of_a_hole_of_any_shape() -> None:
    holed = Image.new("RGB", (101, 37), "red")
    holed.paste("blue", (0, 0, 100, 37))
    filled = array(imaging.fill(holed, mask_of(101, 37, (0, 0, 100, 37)), "surroundings", 1))
    assert (np.abs(filled - (255, 0, 0)) <= 1).all()


def test_without_surroundings_there_is_grey() -> None:
    filled = array(imaging.fill(noise(33, 20), mask_of(33, 20, (0, 0, 33, 20)), "surroundings", 1))
    assert (filled == 128).all()


# --- outpainting ---


def test_the_old_picture_lies_untouched_on_the_grown_canvas() -> None:
    picture = noise(40, 30)
    canvas, mask = imaging.outpaint_canvas(picture, Outpaint(8, 16, 24, 0, blur_px=4), 1)
    assert canvas.size == mask.size == (72, 46)
    assert (array(canvas)[16:46, 8:48] == array(picture)).all()
    soft = array(mask)
    assert (soft[:16] == 255).all()
    assert (soft[:, :8] == 255).all()
    assert (soft[:, 48:] == 255).all()
    assert (soft[20:, 12:44] == 0).all()  # the bottom does not grow, so its edge is not softened
    assert 0 < soft[30, 8] < 255
    assert (np.diff(soft[30, :24]) <= 0).all()


def test_without_softening_the_mask_is_the_new_area() -> None:
    _, mask = imaging.outpaint_canvas(noise(40, 30), Outpaint(0, 0, 8, 0, blur_px=0), 1)
    assert mask.tobytes() == mask_of(48, 30, (40, 0, 48, 30)).tobytes()


@pytest.mark.parametrize("fill", ["surroundings", "noise", "grey"])
def test_the_new_area_is_filled_as_asked(fill: str) -> None:
    picture = Image.new("RGB", (40, 32), (200, 30, 30))
    canvas, _ = imaging.outpaint_canvas(picture, Outpaint(16, 0, 0, 0, fill=fill), 3)  # type: ignore[arg-type]
    new = array(canvas)[:, :16]
    match fill:
        case "surroundings":
            assert (np.abs(new - (200, 30, 30)) <= 1).all()
        case "grey":
            assert (new == 128).all()
        case _:
            assert new.std() > 60


# --- to a higher size ---


@pytest.mark.parametrize("upscaler", ["lanczos", "bicubic", "nearest"])
def test_an_upscaled_picture_is_the_same_picture(upscaler: str) -> None:
    large = imaging.upscale(scene(40, 32), 100, 64, upscaler)  # type: ignore[arg-type]
    assert large.size == (100, 64)
    assert np.abs(array(large.resize((40, 32), Image.Resampling.BOX)) - array(scene(40, 32))).max() <= 8


def test_nearest_makes_blocks_and_the_others_do_not() -> None:
    small = noise(8, 8)
    blocks = array(small).repeat(4, axis=0).repeat(4, axis=1)
    assert (array(imaging.upscale(small, 32, 32, "nearest")) == blocks).all()
    assert (array(imaging.upscale(small, 32, 32, "lanczos")) != blocks).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_upscaled_latents_keep_their_type_and_places(dtype: torch.dtype) -> None:
    latents = torch.arange(2 * 4 * 2 * 3, dtype=dtype).reshape(2, 4, 2, 3)
    blocks = imaging.upscale_latents(latents, "latent_nearest", 4, 6)
    assert blocks.dtype == dtype
    assert torch.equal(blocks, latents.repeat_interleave(2, 2).repeat_interleave(2, 3))
    smooth = imaging.upscale_latents(latents, "latent", 5, 9)
    assert (smooth.dtype, smooth.shape) == (dtype, (2, 4, 5, 9))
    assert (smooth[0, 0, 0].diff() >= 0).all()
    assert smooth.min().item() == pytest.approx(latents.min().item())
    assert smooth.max().item() == pytest.approx(latents.max().item())
