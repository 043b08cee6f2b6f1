"""The engine's promises: pictures do not depend on the company they are painted in, and stopping really stops."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoPipelineForText2Image
from PIL import Image

from services.diffusion import metadata
from services.diffusion.domain import MEDIA_TYPES, PreviewPainted, StepDone
from services.diffusion.engine.main import DiffusionEngine
from services.kit import phases
from services.kit.engine_api import Accepted, Cancelled, Failed, Finished
from services.kit.faults import Kind
from tests.unit.diffusion.conftest import Driver, paint_job

# diffusers' KDPM2 classes use numpy in ways that it will give up.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@contextmanager
def denoiser_answering(engine: DiffusionEngine, model: str, answer: Any) -> Iterator[list[int]]:
    """Watch, and change, what a model's denoiser answers; yields the row count of every evaluation."""
    rows: list[int] = []

    def hook(module: Any, args: Any, output: Any) -> Any:
        rows.append(output[0].shape[0])
        return answer(output)

    handle = engine.shelf.model(model).denoiser.register_forward_hook(hook)
    # The hook runs where the pipeline calls the module: inside the lane, after the engine's evaluation.
    try:
        yield rows
    finally:
        handle.remove()


def same(output: Any) -> Any:
    return output


def pixels(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)))


class TestSameBytes:
    def test_a_picture_is_what_diffusers_itself_paints(self, driver: Driver, folders: Any) -> None:
        job = paint_job(step_count=5, seed=11)
        pipeline = AutoPipelineForText2Image.from_pretrained(folders["zero-snr"])
        pipeline.set_progress_bar_config(disable=True)
        expected = pipeline(
            job.parameters.prompt,
            num_inference_steps=5,
            guidance_scale=2.0,
            generator=torch.Generator().manual_seed(11),
        ).images[0]
        assert np.array_equal(pixels(driver.paint(job).images[0]), np.asarray(expected))

    def test_repeating_gives_the_same_file(self, driver: Driver) -> None:
        for media_type in MEDIA_TYPES:
            job = paint_job(media_type=media_type)
            assert driver.paint(job) == driver.paint(job)

    def test_another_seed_gives_another_picture(self, driver: Driver) -> None:
        one, other = (pixels(driver.paint(paint_job(seed=seed)).images[0]) for seed in (1, 2))
        assert not np.array_equal(one, other)

    def test_picture_i_is_the_picture_of_seed_plus_i_asked_for_alone(self, driver: Driver) -> None:
        together = driver.paint(paint_job(seed=40, image_count=3, scheduler="euler_ancestral"))
        for i in range(3):
            alone = driver.paint(paint_job(seed=40 + i, scheduler="euler_ancestral"))
            assert together.images[i] == alone.images[0]

    @pytest.mark.parametrize("scheduler", ["ddim", "euler_ancestral", "dpmpp_2m_sde", "unipc"])
    def test_neighbours_do_not_change_a_picture(self, driver: Driver, scheduler: str) -> None:
        job = paint_job(scheduler=scheduler, step_count=6)
        alone = driver.paint(job)
        driver.submit("subject", job)
        driver.submit("same settings", paint_job(scheduler=scheduler, step_count=6, seed=8, image_count=2))
        driver.step()
        driver.submit("late and different", paint_job(width=48, step_count=3, scheduler="heun", model="plain"))
        driver.submit("without guidance", paint_job(guidance_scale=1.0, step_count=2))
        driver.finish()
        assert driver.painted("subject") == alone

    def test_a_neighbour_cancelled_at_step_2_of_50_does_not_change_a_picture(self, driver: Driver) -> None:
        job = paint_job(step_count=6, scheduler="dpmpp_2m")
        alone = driver.paint(job)
        driver.submit("leaves", paint_job(step_count=50, seed=1))
        driver.submit("stays", job)
        driver.until_step("leaves", 2)
        driver.engine.cancel("leaves")
        driver.finish()
        assert driver.painted("stays") == alone
        assert driver.events["leaves"][-1] == Cancelled("leaves")


class TestCancel:
    def test_no_further_evaluation_runs(self, driver: Driver) -> None:
        with denoiser_answering(driver.engine, "zero-snr", same) as rows:
            driver.submit("job", paint_job(step_count=50, image_count=2))
            driver.until_step("job", 2)
            assert len(rows) == 4  # two steps of two pictures
            driver.engine.cancel("job")
            driver.finish()
            assert len(rows) == 4
        assert driver.events["job"][-1] == Cancelled("job")
        assert not any(isinstance(event, Finished) for event in driver.events["job"])

    def test_before_its_first_turn(self, driver: Driver) -> None:
        with denoiser_answering(driver.engine, "zero-snr", same) as rows:
            driver.submit("job", paint_job())
            driver.engine.cancel("job")
            driver.finish()
            assert rows == []
        assert driver.events["job"] == [Cancelled("job")]

    def test_before_decoding(self, driver: Driver) -> None:
        decoded: list[int] = []
        vae = driver.engine.shelf.model("zero-snr").pipeline.vae
        handle = vae.post_quant_conv.register_forward_hook(lambda *_: decoded.append(1))
        try:
            driver.submit("job", paint_job(step_count=3))
            driver.until_step("job", 3)
            driver.engine.cancel("job")
            driver.finish()
        finally:
            handle.remove()
        assert decoded == []
        assert driver.events["job"][-1] == Cancelled("job")

    def test_of_a_finished_or_unknown_job_is_ignored(self, driver: Driver) -> None:
        driver.paint(paint_job())
        driver.engine.cancel("alone")
        driver.engine.cancel("never heard of")
        assert not driver.engine.busy

    def test_a_stopped_job_leaves_its_pipeline_usable(self, driver: Driver) -> None:
        before = driver.paint(paint_job())
        driver.submit("job", paint_job(step_count=50))
        driver.until_step("job", 1)
        driver.engine.cancel("job")
        driver.finish()
        assert driver.paint(paint_job()) == before


class TestTurns:
    def test_calls_take_turns(self, driver: Driver) -> None:
        """A call of eight pictures does not slow a call of one more than a call of one would."""
        driver.submit("many", paint_job(step_count=20, image_count=8))
        driver.submit("one", paint_job(step_count=4))
        while not any(isinstance(event, Finished) for event in driver.events["one"]):
            driver.step()
        assert driver.engine.evaluations("many") <= 4 + 2
        driver.engine.cancel("many")
        driver.finish()

    def test_the_pictures_of_a_call_do_each_step_together(self, driver: Driver) -> None:
        driver.submit("job", paint_job(step_count=5, image_count=3))
        for step in range(1, 6):
            driver.until_step("job", step)
            assert driver.engine.evaluations("job") == step * 3
        driver.finish()

    def test_one_step_is_at_most_one_evaluation(self, driver: Driver) -> None:
        with denoiser_answering(driver.engine, "zero-snr", same) as rows:
            driver.submit("a", paint_job(image_count=2))
            driver.submit("b", paint_job())
            while driver.engine.busy:
                before = len(rows)
                driver.step()
                assert len(rows) - before <= 1

    def test_every_evaluation_keeps_the_shape_it_has_alone(self, driver: Driver) -> None:
        with denoiser_answering(driver.engine, "zero-snr", same) as rows:
            driver.submit("guided", paint_job(image_count=3))
            driver.submit("unguided", paint_job(guidance_scale=1.0))
            driver.finish()
        assert sorted(rows) == [1] * 4 + [2] * 12

    def test_autograd_stays_off_between_turns(self, driver: Driver) -> None:
        driver.submit("a", paint_job())
        driver.submit("b", paint_job(seed=1))
        while driver.engine.busy:
            driver.step()
            assert not torch.is_grad_enabled()


class TestFlowMatchingTransformers:
    """Nothing is particular to Stable Diffusion's UNet: here a Stable Diffusion 3 with a transformer."""

    def test_are_painted_and_shared_like_any_other(self, driver: Driver) -> None:
        job = paint_job(model="flow", scheduler="flow_euler", step_count=5, image_count=2)
        alone = driver.paint(job)
        driver.submit("job", job)
        driver.submit("neighbour", paint_job())
        driver.finish()
        assert driver.painted("job") == alone
        assert [update.step for update in driver.updates("job")] == [1, 2, 3, 4, 5]
        assert (
            alone.images[1]
            == driver.paint(paint_job(model="flow", scheduler="flow_euler", step_count=5, seed=8)).images[0]
        )

    def test_say_what_they_take(self, driver: Driver) -> None:
        info = driver.engine.info().model("flow")
        assert info is not None
        assert (info.pipeline, info.default_scheduler) == ("StableDiffusion3Pipeline", "flow_euler")
        assert info.schedulers
        assert all(name.startswith("flow_") for name in info.schedulers)
        assert (info.default_width, info.size_multiple, info.prompt_token_limit) == (32, 16, 14)

    def test_take_every_multiple_they_name(self, driver: Driver) -> None:
        content = driver.paint(paint_job(model="flow", scheduler="flow_euler", width=48, height=16)).images[0]
        assert Image.open(io.BytesIO(content)).size == (48, 16)


class TestReports:
    @pytest.mark.parametrize(
        ("scheduler", "step_count"), [("ddim", 1), ("ddim", 7), ("pndm", 7), ("kdpm2", 7), ("lcm", 7), ("dpmpp_2s", 7)]
    )
    def test_progress_counts_every_step_once(self, driver: Driver, scheduler: str, step_count: int) -> None:
        driver.submit("job", paint_job(scheduler=scheduler, step_count=step_count, image_count=2))
        driver.finish()
        updates = driver.updates("job")
        done = [update for update in updates if isinstance(update, StepDone) and update.step_count == step_count]
        assert len(done) == len(updates)
        assert [update.step for update in done] == list(range(1, step_count + 1))
        assert done[-1].eta_ms == 0
        assert isinstance(driver.events["job"][0], Accepted)

    def test_previews_show_every_picture_at_the_interval(self, driver: Driver) -> None:
        driver.submit("job", paint_job(step_count=5, image_count=2, preview_interval=2))
        driver.finish()
        previews = [update for update in driver.updates("job") if isinstance(update, PreviewPainted)]
        assert [preview.step for preview in previews] == [2, 4]
        for preview in previews:
            images = [Image.open(io.BytesIO(content)) for content in preview.images]
            assert [(image.format, image.size) for image in images] == [("JPEG", (32, 32))] * 2
            assert preview.images[0] != preview.images[1]

    def test_previews_do_not_change_the_picture(self, driver: Driver) -> None:
        job = paint_job(scheduler="dpmpp_2m_sde")
        assert driver.paint(paint_job(scheduler="dpmpp_2m_sde", preview_interval=1)) == driver.paint(job)

    def test_a_model_without_preview_autoencoder_paints_them_by_a_linear_map(self, driver: Driver) -> None:
        driver.submit("job", paint_job(model="plain", preview_interval=1))
        driver.finish()
        previews = [update for update in driver.updates("job") if isinstance(update, PreviewPainted)]
        assert [preview.step for preview in previews] == [1, 2, 3], "the result follows the last step"
        assert Image.open(io.BytesIO(previews[0].images[0])).size == (32, 32)
        assert [model.has_preview_autoencoder for model in driver.engine.info().models] == [True, False, False]

    def test_warns_of_the_part_of_a_plain_prompt_that_was_cut_off(self, driver: Driver) -> None:
        # The tiny tokenizer makes one token of each letter and takes in 14.
        long = "abcdefghijklmn" + "opq"
        painted = driver.paint(paint_job(prompt=long, negative_prompt="short", prompt_syntax="plain"))
        assert painted.warnings == ("prompt: the model takes in 14 tokens; it did not see the end: 'opq'",)
        assert driver.paint(paint_job(prompt="abcdefghijklmn")).warnings == ()

    def test_the_end_of_a_long_prompt_is_heard(self, driver: Driver) -> None:
        pictures = [driver.paint(paint_job(prompt="abcdefghijklmn" * 2 + end)) for end in ("opq", "xyz")]
        assert pictures[0].images != pictures[1].images
        assert pictures[0].warnings == ()

    def test_warns_that_a_negative_prompt_wants_guidance(self, driver: Driver) -> None:
        (warning,) = driver.paint(paint_job(negative_prompt="blue", guidance_scale=1.0)).warnings
        assert warning.startswith("negative_prompt: it has no effect at guidance_scale 1")

    def test_the_negative_prompt_is_heard(self, driver: Driver) -> None:
        plain, steered = (driver.paint(paint_job(negative_prompt=text)).images[0] for text in ("", "blue"))
        assert not np.array_equal(pixels(plain), pixels(steered))


class TestPictures:
    @pytest.mark.parametrize("media_type", MEDIA_TYPES)
    def test_the_file_is_of_the_type_and_size_and_carries_its_parameters(self, driver: Driver, media_type: str) -> None:
        job = paint_job(media_type=media_type, width=48, height=40, image_count=2)
        painted = driver.paint(job)
        for i, content in enumerate(painted.images):
            image = Image.open(io.BytesIO(content))
            assert (Image.MIME[image.format or ""], image.size, image.mode) == (media_type, (48, 40), "RGB")
            assert metadata.read(content)[0] == job.pictures[i]

    def test_a_picture_can_be_repeated_from_its_own_file(self, driver: Driver) -> None:
        first = driver.paint(paint_job(scheduler="tcd", seed=3)).images[0]
        again = driver.paint(paint_job(**_fields(metadata.read(first)[0])))
        assert again.images[0] == first


class TestFaults:
    def test_values_that_are_not_numbers_are_a_fault_and_spare_the_neighbour(self, driver: Driver) -> None:
        alone = driver.paint(paint_job(model="plain"))
        driver.submit("good", paint_job(model="plain"))
        with denoiser_answering(driver.engine, "zero-snr", lambda output: (output[0] * float("nan"),)):
            driver.submit("bad", paint_job(step_count=30))
            driver.finish()
        fault = driver.fault("bad")
        assert (fault.kind, fault.reason) == (Kind.INTERNAL, "PICTURE_NOT_FINITE")
        assert driver.updates("bad") == [], "it failed at the step that made them"
        assert driver.painted("good") == alone

    def test_a_black_picture_is_a_fault(self, driver: Driver) -> None:
        vae = driver.engine.shelf.model("zero-snr").pipeline.vae
        handle = vae.decoder.register_forward_hook(lambda module, args, output: torch.full_like(output, -5.0))
        try:
            driver.submit("job", paint_job())
            driver.finish()
        finally:
            handle.remove()
        assert driver.fault("job").reason == "PICTURE_BLACK"

    def test_a_pipeline_that_raises_fails_that_call_alone_and_keeps_the_prompt_to_itself(
        self, driver: Driver, caplog: pytest.LogCaptureFixture
    ) -> None:
        def broken(output: Any) -> Any:
            raise RuntimeError("while painting 'my secret'")

        driver.submit("good", paint_job(model="plain"))
        with denoiser_answering(driver.engine, "zero-snr", broken):
            driver.submit("bad", paint_job(prompt="my secret"))
            driver.finish()
        assert driver.fault("bad").kind is Kind.INTERNAL
        assert "my secret" not in driver.fault("bad").message + caplog.text
        assert driver.painted("good").images

    def test_out_of_memory_is_no_reason_to_retry(self, driver: Driver) -> None:
        def full(output: Any) -> Any:
            raise torch.OutOfMemoryError("no room")

        with denoiser_answering(driver.engine, "zero-snr", full):
            driver.submit("job", paint_job(width=48))
            driver.finish()
        fault = driver.fault("job")
        assert (fault.kind, fault.reason, fault.retry_after_ms) == (Kind.TOO_LARGE, "OUT_OF_MEMORY", None)
        assert "48x32" in fault.message

    def test_every_fault_leaves_nothing_behind(self, driver: Driver) -> None:
        with denoiser_answering(driver.engine, "zero-snr", lambda output: (output[0] * float("inf"),)):
            for name in "abc":
                driver.submit(name, paint_job(image_count=2))
            driver.finish()
        assert all(isinstance(driver.events[name][-1], Failed) for name in "abc")
        assert not driver.engine.busy
        assert driver.engine._calls == {}


def _fields(parameters: Any) -> dict[str, Any]:
    return {name: getattr(parameters, name) for name in parameters.__struct_fields__}


def test_a_followed_picture_tells_its_phases_and_each_step(driver: Driver) -> None:
    phases.follow("alone")
    driver.paint(paint_job(step_count=4))
    went_through = phases.take("alone")
    assert [phase.name for phase in went_through] == ["wait", "encode", "denoise", "decode"]
    denoise = went_through[2]
    assert [step.attributes["number"] for step in denoise.steps] == [1, 2, 3, 4]
    assert denoise.attributes == {"batch_size": 1, "steps": 4}
