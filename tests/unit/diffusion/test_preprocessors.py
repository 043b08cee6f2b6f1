"""Conditions: what each preprocessor shows of a picture whose shapes are known, and the models that some need."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFilter
from pydantic import ValidationError
from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config, DPTImageProcessorPil

from services.diffusion import preprocessor_table
from services.diffusion.engine import preprocessors
from services.diffusion.engine.preprocessors import Models
from services.diffusion.settings import ModelSettings, Settings
from services.kit.faults import Fault, Kind

CPU = torch.device("cpu")


def settings(**fields: object) -> Settings:
    return Settings(models={"m": ModelSettings(source="m")}, **fields)  # type: ignore[arg-type]


WITHOUT_MODELS = settings()
NAMES = preprocessor_table.names(WITHOUT_MODELS)
LINES = ("canny", "scribble", "lineart", "softedge", "straight_lines")
NO_MODELS = Models(WITHOUT_MODELS, CPU)


def picture(side: int = 256) -> Image.Image:
    """A red disc and a dark green square on pale yellow, at quarters of the side, as a renderer would draw them."""
    large = Image.new("RGB", (side * 4, side * 4), (250, 240, 200))
    draw = ImageDraw.Draw(large)
    draw.ellipse((side * 0.5, side * 0.5, side * 1.5, side * 1.5), fill=(220, 40, 40))
    draw.rectangle((side * 2.5, side * 2, side * 3.5, side * 3.5), fill=(20, 80, 40))
    return large.resize((side, side), Image.Resampling.LANCZOS)


def true_edges(side: int) -> np.ndarray:
    """Where the shapes of `picture` end, by their geometry."""
    y, x = np.mgrid[0:side, 0:side] / side
    radius = np.hypot(x - 0.25, y - 0.25)
    square = np.maximum(np.abs(x - 0.75) - 0.125, np.abs(y - 0.6875) - 0.1875)
    edges: np.ndarray = (np.abs(radius - 0.125) < 1 / side) | (np.abs(square) < 1 / side)
    return edges


def condition(name: str, image: Image.Image) -> np.ndarray:
    made = preprocessors.run(name, image, NO_MODELS)
    assert (made.mode, made.size) == ("RGB", image.size)
    return np.asarray(made)


def grown(mask: np.ndarray, by: int) -> np.ndarray:
    return cv2.dilate(mask.astype(np.uint8), np.ones((2 * by + 1, 2 * by + 1), np.uint8)) > 0


# --- the table ---


def test_what_needs_a_model_is_listed_only_where_one_is_configured() -> None:
    assert "depth" not in NAMES
    assert "depth" in preprocessor_table.names(settings(preprocessor_models={"depth": "/models/depth"}))
    assert "canny" in NAMES


def test_a_model_for_a_preprocessor_that_takes_none_is_a_wrong_setting() -> None:
    with pytest.raises(ValidationError, match="preprocessor_models"):
        settings(preprocessor_models={"pose": "/models/pose"})


def test_every_name_has_one_sentence() -> None:
    described = preprocessor_table.descriptions(settings(preprocessor_models={"depth": "/models/depth"}))
    assert set(described) == {*NAMES, "depth"}
    for name, description in described.items():
        assert description.endswith("."), name
        assert ". " not in description, name


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [(64, 64), (200, 88), (8, 300), (1, 1)])
def test_each_runs_at_any_size_and_always_the_same(name: str, size: tuple[int, int]) -> None:
    image = picture().resize(size)
    assert (condition(name, image) == condition(name, image)).all()


# --- lines ---


def test_canny_is_what_the_shipped_control_was_trained_on() -> None:
    image = picture(64)
    wanted = cv2.Canny(cv2.cvtColor(np.asarray(image), cv2.COLOR_RGB2GRAY), 100, 200)
    assert (condition("canny", image) == wanted[..., None]).all()
    assert 0.02 < (wanted > 0).mean() < 0.2


@pytest.mark.parametrize("name", LINES)
@pytest.mark.parametrize("side", [64, 256, 512])
def test_lines_are_white_where_shapes_end_and_nowhere_else(name: str, side: int) -> None:
    made = condition(name, picture(side))
    assert (made[..., 0] == made[..., 1]).all()
    assert (made[..., 1] == made[..., 2]).all()
    edges, lines = true_edges(side), made[..., 0] >= 128
    near = max(round(side / 50), 2)
    assert not (lines & ~grown(edges, near)).any()
    if name == "straight_lines":
        disc = edges[: side // 2, : side // 2]
        assert (disc & grown(lines, near)[: side // 2, : side // 2]).sum() < 0.7 * disc.sum()
        disc[:] = False
    assert (edges & grown(lines, near)).sum() > 0.9 * edges.sum()


@pytest.mark.parametrize("name", LINES)
def test_an_empty_picture_has_no_lines(name: str) -> None:
    noisy = np.random.RandomState(1).randint(126, 129, (96, 96, 3)).astype(np.uint8)
    assert condition(name, Image.new("RGB", (96, 96), (200, 30, 90))).max() == 0
    assert condition(name, Image.fromarray(noisy)).max() < 100


@pytest.mark.parametrize("name", ["scribble", "softedge"])
def test_shapes_that_differ_in_colour_alone_have_lines(name: str) -> None:
    image = Image.new("RGB", (128, 128), (200, 60, 60))
    image.paste((60, 118, 255), (32, 32, 96, 96))
    assert abs(np.ptp(np.asarray(image.convert("L")).astype(int))) < 40
    assert condition(name, image).max() == 255


def test_strokes_of_a_scribble_are_thicker_than_edges() -> None:
    image = picture(512)
    scribble, canny = ((condition(name, image) > 0).sum() for name in ("scribble", "canny"))
    assert scribble > 2.5 * canny


def test_soft_edges_are_soft() -> None:
    image = picture(256)
    assert len(np.unique(condition("softedge", image))) > 100
    sharp, out_of_focus = image, image.filter(ImageFilter.GaussianBlur(6))
    widths = [(condition("softedge", one)[..., 0] > 80).sum() for one in (sharp, out_of_focus)]
    assert widths[1] > 1.5 * widths[0]


def test_a_drawn_line_is_one_line_of_lineart() -> None:
    image = Image.new("RGB", (128, 128), "white")
    image.paste((30, 30, 30), (60, 10, 63, 118))
    made = condition("lineart", image)[..., 0]
    assert made[64, 60:63].min() > 200
    assert made[64, :56].max() < 40
    assert made[64, 67:].max() < 40


# --- the others ---


def test_tile_keeps_the_colours_and_loses_the_detail() -> None:
    checked = np.indices((64, 64)).sum(axis=0) % 2 * 255
    made = condition("tile", Image.fromarray(np.dstack([checked] * 3).astype(np.uint8))).astype(int)
    assert np.abs(made - 127.5).max() < 3
    image = picture(256)
    assert np.abs(condition("tile", image).astype(int) - np.asarray(image)).mean() < 4


def test_blur_grows_with_the_picture() -> None:
    small, large = condition("blur", picture(128)), condition("blur", picture(512))
    reduced = np.asarray(Image.fromarray(large).resize((128, 128), Image.Resampling.BOX)).astype(int)
    assert np.abs(reduced - small).mean() < 1
    assert np.abs(small.astype(int) - np.asarray(picture(128))).mean() > 1


def test_the_colour_grid_has_eight_cells_to_the_shorter_side() -> None:
    image = picture(256).resize((512, 256))
    made = condition("color", image)
    cells = made.reshape(8, 32, 16, 32, 3)
    assert (cells == cells[:, :1, :, :1]).all()
    means = np.asarray(image).reshape(8, 32, 16, 32, 3).mean(axis=(1, 3))
    assert np.abs(cells[:, 0, :, 0] - means).max() <= 1


def test_luminance_orders_colours_as_they_look() -> None:
    image = Image.new("RGB", (40, 8))
    for index, colour in enumerate(["black", "blue", "red", "yellow", "white"]):
        image.paste(colour, (index * 8, 0, index * 8 + 8, 8))
    made = condition("luminance", image)
    levels = made[4, 4::8, 0].tolist()
    assert levels == sorted(set(levels))
    assert (levels[0], levels[-1]) == (0, 255)


def test_shuffling_keeps_colours_and_loses_places() -> None:
    image = picture(256)
    made = condition("shuffle", image)
    assert (np.abs(made.astype(int) - np.asarray(image)).max(axis=2) > 40).mean() > 0.1
    for colour in ((250, 240, 200), (220, 40, 40), (20, 80, 40)):
        assert (np.abs(made.astype(int) - colour).max(axis=2) < 8).mean() > 0.003, colour


def test_a_threshold_parts_a_drawing_from_uneven_paper() -> None:
    paper = np.linspace(150, 240, 96)[None, :].repeat(96, axis=0)
    paper[40:50, 8:88] = 50
    made = condition("threshold", Image.fromarray(np.dstack([paper] * 3).astype(np.uint8)))[..., 0]
    assert set(np.unique(made)) == {0, 255}
    assert (made[40:50, 8:88] == 0).all()
    assert (made == 0).sum() == 800


def test_the_negative_of_the_negative_is_the_picture() -> None:
    image = picture(64)
    assert (condition("invert", image) == 255 - np.asarray(image)).all()


# --- depth ---


def tiny_depth_config(**fields: object) -> DepthAnythingConfig:
    backbone = Dinov2Config(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=56,
        patch_size=14,
        out_features=["stage1", "stage2", "stage3", "stage4"],
        apply_layernorm=True,
        reshape_hidden_states=False,
    )
    return DepthAnythingConfig(
        backbone_config=backbone,
        patch_size=14,
        reassemble_hidden_size=16,
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
        head_hidden_size=8,
        **fields,
    )


@pytest.fixture(scope="module")
def model() -> DepthAnythingForDepthEstimation:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = DepthAnythingForDepthEstimation(tiny_depth_config())
        for parameter in model.parameters():
            # The usual small numbers would give the same depth everywhere.
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture
def folder(model: DepthAnythingForDepthEstimation, tmp_path: Path) -> Path:
    made = tmp_path / "depth"
    model.save_pretrained(made)
    DPTImageProcessorPil(
        size={"height": 56, "width": 56},
        keep_aspect_ratio=True,
        ensure_multiple_of=14,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    ).save_pretrained(made)
    return made


def depth_models(folder: Path) -> Models:
    return Models(settings(preprocessor_models={"depth": str(folder)}), CPU)


def depth_of(folder: Path, image: Image.Image) -> np.ndarray:
    made = preprocessors.run("depth", image, depth_models(folder))
    assert (made.mode, made.size) == ("RGB", image.size)
    return np.asarray(made)[..., 0]


def test_depth_is_the_models_own_stretched_from_black_to_white(
    folder: Path, model: DepthAnythingForDepthEstimation
) -> None:
    image = picture(112).resize((112, 84))
    made = depth_of(folder, image)
    processor = DPTImageProcessorPil.from_pretrained(folder)
    with torch.no_grad():
        said = model.eval()(**processor(images=image, return_tensors="pt")).predicted_depth
    wanted = torch.nn.functional.interpolate(said[None], size=(84, 112), mode="bicubic")[0, 0]
    wanted = (wanted - wanted.min()) / (wanted.max() - wanted.min()) * 255
    assert (made.min(), made.max()) == (0, 255)
    assert np.abs(made - wanted.numpy()).max() <= 1


def test_metres_are_turned_so_that_the_nearest_is_white(tmp_path: Path, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    relative = depth_of(folder, picture(56)).astype(float)
    (folder / "config.json").write_text(json.dumps({**config, "depth_estimation_type": "metric", "max_depth": 20}))
    metric = depth_of(folder, picture(56)).astype(float)
    assert np.corrcoef(relative.ravel(), metric.ravel())[0, 1] < -0.3


def test_the_model_is_read_once(folder: Path) -> None:
    models = depth_models(folder)
    first = preprocessors.run("depth", picture(56), models)
    shutil.rmtree(folder)
    assert preprocessors.run("depth", picture(56), models).tobytes() == first.tobytes()


def _no_folder(folder: Path) -> None:
    shutil.rmtree(folder)


def _no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _cut_off(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def _other_kind(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "vit"}')


def _no_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def _no_processor(folder: Path) -> None:
    (folder / "preprocessor_config.json").unlink()


def _other_widths(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "fusion_hidden_size": 12}))


def _more_layers(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["backbone_config"]["num_hidden_layers"] = 5
    config["backbone_config"]["stage_names"] = ["stem", *(f"stage{i}" for i in range(1, 6))]
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_no_folder, "no such folder"),
        (_no_weights, "safetensors"),
        (_pickled, "pickled weights are refused"),
        (_cut_off, "cannot be loaded"),
        (_other_kind, "accepted: depth_anything, dpt"),
        (_no_json, "config.json cannot be read"),
        (_no_processor, "cannot be loaded"),
        (_other_widths, "another shape"),
        (_more_layers, "weights are missing"),
    ],
)
def test_a_folder_that_cannot_be_used_is_named_with_the_reason(
    folder: Path, damage: Callable[[Path], None], said: str
) -> None:
    damage(folder)
    with pytest.raises(Fault) as caught:
        depth_of(folder, picture(56))
    assert (caught.value.data.kind, caught.value.data.reason) == (Kind.FAILED_PRECONDITION, "PREPROCESSOR_UNUSABLE")
    assert str(folder) in caught.value.data.message
    assert said in caught.value.data.message


def test_a_mended_folder_is_read_at_the_next_call(folder: Path) -> None:
    hidden = folder.rename(folder.with_name("elsewhere"))
    models = depth_models(folder)
    with pytest.raises(Fault):
        preprocessors.run("depth", picture(56), models)
    hidden.rename(folder)
    assert np.ptp(np.asarray(preprocessors.run("depth", picture(56), models))) == 255
