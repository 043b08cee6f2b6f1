"""What the engine paints in every mode, on tiny models of every family."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import msgspec
import numpy as np
import pytest
import torch
from PIL import Image

from services.diffusion.domain import (
    Control,
    FreeU,
    Hires,
    ImagePrompt,
    Inpaint,
    Lora,
    Outpaint,
    Painted,
    PaintJob,
    PerturbedAttention,
    Pixels,
    Refiner,
    Sampling,
    StepDone,
    Vae,
    Variation,
)
from services.diffusion.engine.main import DiffusionEngine, create_engine
from services.diffusion.settings import Settings
from services.kit.faults import Kind
from tests.support import tiny_adapters
from tests.unit.diffusion.conftest import Driver, Families, paint_job

FAMILIES = ("sd15", "sdxl", "sd3", "flux")
SIDE = 64


@pytest.fixture(scope="module")
def studio(
    tmp_path_factory: pytest.TempPathFactory, folders: dict[str, Path], families: Families
) -> Iterator[DiffusionEngine]:
    """An engine over all families, with one adapter of each kind for the small U-Net model."""
    root = tmp_path_factory.mktemp("adapters")
    base = folders["plain"]
    models = {name: {"source": str(families.folder(name))} for name in (*FAMILIES, "sdxl-refiner")}
    soft = root / "vae"
    torch.manual_seed(5)
    vae = diffusers.AutoencoderKL.from_pretrained(base / "vae")
    for weight in vae.decoder.conv_out.parameters():
        weight.data *= 0.5
    vae.save_pretrained(soft)
    encoder = tiny_adapters.make_image_encoder(root / "encoder")
    settings = Settings.model_validate(
        {
            "models": {
                "plain": {"source": str(base), "vaes": {"soft": str(soft)}},
                "other": {"source": str(folders["zero-snr"])},
                **models,
            },
            "load_at_start": ["plain"],
            "loras": {"a": {"source": str(tiny_adapters.make_lora(base, root / "lora", 1))}},
            "controls": {
                "net": {"source": str(tiny_adapters.make_controlnet(base, root / "net", 1))},
                "net2": {"source": str(tiny_adapters.make_controlnet(base, root / "net2", 2))},
                "t2i": {"source": str(tiny_adapters.make_t2i_adapter(root / "t2i", 1))},
            },
            "image_prompt_adapters": {
                "ip": {
                    "source": str(tiny_adapters.make_ip_adapter(base, root / "ip.safetensors", 1)),
                    "image_encoder": str(encoder),
                }
            },
            "threads": 1,
        }
    )
    threads, grad = torch.get_num_threads(), torch.is_grad_enabled()
    yield create_engine(settings.model_dump_json())
    torch.set_num_threads(threads)
    torch.set_grad_enabled(grad)


@pytest.fixture
def driver(studio: DiffusionEngine) -> Iterator[Driver]:
    driver = Driver(studio)
    yield driver
    assert not studio.busy, "a test left work behind"


def finish(driver: Driver, job: PaintJob) -> Painted:
    """Paint it, waiting for models that have to be loaded."""
    driver.submit("job", job)
    while not driver.events["job"] or type(driver.events["job"][-1]).__name__ not in ("Finished", "Failed"):
        driver.step()
    return driver.painted("job")


def photo(width: int = SIDE, height: int = SIDE, seed: int = 1) -> Image.Image:
    rows = np.random.RandomState(seed).randint(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(rows).resize((width, height), Image.Resampling.BICUBIC)


def given(image: Image.Image) -> Pixels:
    return Pixels(image.width, image.height, "L" if image.mode == "L" else "RGB", image.tobytes())


def job(model: str = "plain", *, images: dict[str, Any] | None = None, **fields: Any) -> PaintJob:
    """images: fields of PaintJob."""
    fields.setdefault("scheduler", "flow_euler" if model in ("sd3", "flux") else "ddim")
    made = paint_job(model=model, width=SIDE, height=SIDE, **fields)
    return msgspec.structs.replace(made, **(images or {}))


def pixels(content: bytes) -> Any:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).astype(int)


def from_photo(model: str = "plain", **fields: Any) -> PaintJob:
    fields.setdefault("strength", 0.5)
    return job(model, images={"image": given(photo())}, image_sha256="x", **fields)


def left_half() -> Image.Image:
    mask = Image.new("L", (SIDE, SIDE), 0)
    mask.paste(255, (0, 0, SIDE // 2, SIDE))
    return mask


def inpainting(model: str = "plain", mask: Image.Image | None = None, **fields: Any) -> PaintJob:
    fields.setdefault("inpaint", Inpaint("m"))
    images = {"image": given(photo()), "mask": given(mask or left_half())}
    return job(model, images=images, image_sha256="x", strength=fields.pop("strength", 1.0), **fields)


class TestFromAPicture:
    @pytest.mark.parametrize("model", FAMILIES)
    def test_the_less_strength_the_less_is_repainted(self, driver: Driver, model: str) -> None:
        least, little, all_of_it = (
            pixels(finish(driver, from_photo(model, step_count=10, strength=strength)).images[0])
            for strength in (0.1, 0.2, 1.0)
        )
        assert np.abs(little - least).mean() < np.abs(all_of_it - least).mean()

    def test_is_what_diffusers_paints(self, driver: Driver, folders: dict[str, Path]) -> None:
        pipeline = diffusers.AutoPipelineForImage2Image.from_pretrained(folders["plain"])
        pipeline.set_progress_bar_config(disable=True)
        pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config)
        wanted = pipeline(
            "red panda",
            image=photo(),
            strength=0.5,
            num_inference_steps=4,
            guidance_scale=2.0,
            generator=torch.Generator().manual_seed(7),
            output_type="np",
        ).images[0]
        got = pixels(finish(driver, from_photo()).images[0])
        assert np.array_equal(got, np.rint(wanted * 255).astype(int))

    def test_steps_are_those_that_strength_leaves(self, driver: Driver) -> None:
        finish(driver, from_photo(step_count=10, strength=0.3))
        done = [update for update in driver.updates("job") if isinstance(update, StepDone)]
        assert [(update.step, update.step_count) for update in done] == [(1, 3), (2, 3), (3, 3)]

    def test_a_variation_changes_it(self, driver: Driver) -> None:
        plain, varied = (finish(driver, from_photo(variation=v)).images for v in (None, Variation(99, 0.5)))
        assert plain != varied


class TestInpaint:
    @pytest.mark.parametrize("model", FAMILIES)
    def test_what_the_mask_leaves_out_stays_to_the_pixel(self, driver: Driver, model: str) -> None:
        painted = pixels(finish(driver, inpainting(model)).images[0])
        original = np.asarray(photo()).astype(int)
        assert np.array_equal(painted[:, SIDE // 2 :], original[:, SIDE // 2 :])
        assert np.abs(painted[:, : SIDE // 2] - original[:, : SIDE // 2]).mean() > 5

    def test_inverted_it_is_the_other_side(self, driver: Driver) -> None:
        painted = pixels(finish(driver, inpainting(inpaint=Inpaint("m", inverted=True))).images[0])
        assert np.array_equal(painted[:, : SIDE // 2], np.asarray(photo())[:, : SIDE // 2])

    def test_in_detail_the_result_has_the_size_of_the_picture(self, driver: Driver) -> None:
        large = photo(200, 120)
        mask = Image.new("L", large.size, 0)
        mask.paste(255, (20, 20, 50, 50))
        images = {"image": given(large), "mask": given(mask)}
        wanted = Inpaint("m", blur_px=2, crop_padding_px=8, fill="surroundings")
        painted = pixels(finish(driver, job(images=images, image_sha256="x", strength=1.0, inpaint=wanted)).images[0])
        assert painted.shape == (120, 200, 3)
        original = np.asarray(large).astype(int)
        assert np.array_equal(painted[:, 80:], original[:, 80:])
        assert not np.array_equal(painted[25:45, 25:45], original[25:45, 25:45])

    def test_what_fills_the_hole_shows(self, driver: Driver) -> None:
        kinds: tuple[Any, ...] = ("original", "surroundings", "noise", "grey")
        painted = {
            finish(driver, inpainting(strength=0.5, inpaint=Inpaint("m", fill=kind))).images[0] for kind in kinds
        }
        assert len(painted) == len(kinds)

    @pytest.mark.parametrize("scheduler", ["euler", "dpmpp_2m_karras", "heun", "unipc"])
    def test_with_every_kind_of_scheduler(self, driver: Driver, scheduler: str) -> None:
        painted = pixels(finish(driver, inpainting(scheduler=scheduler, step_count=6)).images[0])
        assert np.array_equal(painted[:, SIDE // 2 :], np.asarray(photo())[:, SIDE // 2 :])

    def test_beyond_the_edges(self, driver: Driver) -> None:
        outpaint = Outpaint(16, 0, 16, 0, blur_px=0)
        inner = photo(32, 64)
        images = {"image": given(inner)}
        painted = finish(driver, job(images=images, image_sha256="x", strength=1.0, outpaint=outpaint)).images[0]
        assert np.array_equal(pixels(painted)[:, 16:48], np.asarray(inner))


class TestPasses:
    @pytest.mark.parametrize("model", FAMILIES)
    @pytest.mark.parametrize("upscaler", ["lanczos", "latent"])
    def test_a_second_pass_paints_larger(self, driver: Driver, model: str, upscaler: Any) -> None:
        hires = Hires(2 * SIDE, 2 * SIDE, upscaler, step_count=4, strength=0.5)
        painted = finish(driver, job(model, step_count=2, hires=hires))
        assert Image.open(io.BytesIO(painted.images[0])).size == (2 * SIDE, 2 * SIDE)
        done = [update.step for update in driver.updates("job") if isinstance(update, StepDone)]
        assert done == [1, 2, 3, 4]

    def test_another_model_takes_the_last_steps(self, driver: Driver) -> None:
        alone = finish(driver, job(step_count=4)).images[0]
        early, late = (finish(driver, job(step_count=4, refiner=Refiner("other", at))).images[0] for at in (0.25, 0.75))
        assert len({alone, early, late}) == 3

    def test_sdxl_hands_over_to_its_refiner_as_diffusers_does(self, driver: Driver, families: Families) -> None:
        base = diffusers.StableDiffusionXLPipeline.from_pretrained(families.folder("sdxl"))
        refiner = diffusers.StableDiffusionXLImg2ImgPipeline.from_pretrained(families.folder("sdxl-refiner"))
        for pipeline in (base, refiner):
            pipeline.set_progress_bar_config(disable=True)
            pipeline.scheduler = diffusers.DDIMScheduler.from_config(base.scheduler.config, clip_sample=False)
        same = {"prompt": "red panda", "num_inference_steps": 4, "guidance_scale": 2.0}
        latents = base(
            **same,
            width=SIDE,
            height=SIDE,
            denoising_end=0.5,
            output_type="latent",
            generator=torch.Generator().manual_seed(7),
        ).images
        wanted = refiner(
            **same,
            image=latents,
            denoising_start=0.5,
            output_type="np",
            generator=torch.Generator().manual_seed(7),
        ).images[0]
        got = finish(driver, job("sdxl", refiner=Refiner("sdxl-refiner", 0.5), step_count=4)).images[0]
        assert np.abs(pixels(got) - wanted * 255).max() <= 1

    def test_batches_come_one_after_the_other_and_equal_those_asked_for_alone(self, driver: Driver) -> None:
        painted = finish(driver, job(image_count=2, batch_count=2))
        assert list(painted.images) == [finish(driver, job(seed=7 + i)).images[0] for i in range(4)]


class TestLayers:
    """Each changes the picture, and leaves nothing behind for the next."""

    CONTROLLED = {"control_images": (given(photo(seed=3)),)}

    @pytest.mark.parametrize(
        ("fields", "images"),
        [
            ({"loras": (Lora("a", 1.0),)}, {}),
            ({"freeu": FreeU()}, {}),
            ({"perturbed_attention": PerturbedAttention()}, {}),
            ({"controls": (Control("net", "x"),)}, CONTROLLED),
            ({"controls": (Control("t2i", "x"),)}, CONTROLLED),
            (
                {"controls": (Control("net", "x"), Control("net2", "x", preprocessor="canny", end=0.5))},
                {"control_images": (given(photo(seed=3)), given(photo(seed=4)))},
            ),
            ({"image_prompts": (ImagePrompt("ip", "x"),)}, {"image_prompt_images": (given(photo(seed=5)),)}),
            ({"vae": Vae("soft")}, {}),
            ({"variation": Variation(99, 0.3)}, {}),
            ({"clip_skip": 1}, {}),
            ({"guidance_rescale": 0.7}, {}),
            ({"sampling": Sampling(eta=1.0)}, {}),
            ({"prompt": "(red:1.5) panda"}, {}),
            ({"prompt": "[red panda:blue fish:0.5]"}, {}),
            ({"prompt": "red panda AND blue fish:0.7"}, {}),
            ({"scheduler": "euler", "sampling": Sampling(sigma_schedule="karras")}, {}),
        ],
    )
    def test_changes_the_picture_and_not_the_neighbours(
        self, driver: Driver, fields: dict[str, Any], images: dict[str, Any]
    ) -> None:
        scheduler = {"scheduler": fields["scheduler"]} if "scheduler" in fields else {}
        plain = finish(driver, job(**scheduler)).images[0]
        layered = msgspec.structs.replace(job(**fields), **images)
        alone = finish(driver, layered).images[0]
        assert alone != plain
        driver.submit("layered", layered)
        driver.submit("neighbour", job(**scheduler))
        driver.submit("again", layered)
        driver.finish()
        assert driver.painted("neighbour").images[0] == plain
        assert driver.painted("layered").images[0] == driver.painted("again").images[0] == alone

    @pytest.mark.parametrize(
        ("fields", "images"),
        [
            ({"loras": (Lora("a", 1.0),)}, {}),
            ({"perturbed_attention": PerturbedAttention()}, {}),
            ({"controls": (Control("net", "x"),)}, CONTROLLED),
            ({"controls": (Control("t2i", "x"),)}, CONTROLLED),
            ({"prompt": "[red panda:blue fish:0.5]"}, {}),
        ],
    )
    def test_goes_with_a_picture_to_start_from(
        self, driver: Driver, fields: dict[str, Any], images: dict[str, Any]
    ) -> None:
        plain = finish(driver, from_photo()).images[0]
        assert finish(driver, msgspec.structs.replace(from_photo(**fields), **images)).images[0] != plain
        assert finish(driver, from_photo()).images[0] == plain

    def test_what_diffusers_cannot_combine_is_refused_before_any_step(self, driver: Driver) -> None:
        # It rescales guidance in text-to-image alone.
        driver.submit("job", from_photo(guidance_rescale=0.7))
        driver.finish()
        fault = driver.fault("job")
        assert (fault.kind, fault.fields[0].field) == (Kind.INVALID_ARGUMENT, "guidance_rescale")
        assert driver.updates("job") == []

    def test_a_call_that_is_cancelled_in_the_middle_leaves_nothing(self, driver: Driver) -> None:
        plain = finish(driver, job()).images[0]
        fields: dict[str, Any] = {"loras": (Lora("a", 1.0),), "freeu": FreeU(), "step_count": 6}
        guided: dict[str, Any] = {"perturbed_attention": PerturbedAttention()}
        for more in ({}, guided):
            driver.submit("layered", job(**fields, **more))
            driver.until_step("layered", 2)
            driver.engine.cancel("layered")
            driver.finish()
            assert finish(driver, job()).images[0] == plain

    def test_the_condition_is_shown_as_the_preprocessor_made_it(self, driver: Driver) -> None:
        asked = msgspec.structs.replace(job(controls=(Control("net", "x", preprocessor="invert"),)), **self.CONTROLLED)
        (condition,) = finish(driver, asked).control_images
        assert np.array_equal(pixels(condition), 255 - np.asarray(photo(seed=3)).astype(int))

    def test_a_control_that_ended_no_longer_steers(self, driver: Driver) -> None:
        plain = finish(driver, job()).images[0]
        for name in ("net", "t2i"):
            off = msgspec.structs.replace(job(controls=(Control(name, "x", scale=0.0),)), **self.CONTROLLED)
            assert np.abs(pixels(finish(driver, off).images[0]) - pixels(plain)).max() <= 1

    @pytest.mark.parametrize("model", ["sd3", "flux"])
    def test_families_without_a_u_net_say_that_freeu_is_not_for_them(self, driver: Driver, model: str) -> None:
        finish(driver, job(model))
        with pytest.raises(Exception, match="FreeU needs"):
            driver.submit("job", job(model, freeu=FreeU()))
