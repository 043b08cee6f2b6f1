"""The diffusion service over the wire: a real server, a real engine process, tiny models with random weights."""

import asyncio
import io
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
import pytest_asyncio
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from PIL import Image

from inkwell.common.v1 import common_pb2
from inkwell.diffusion.v1 import diffusion_pb2 as pb
from inkwell.diffusion.v1 import diffusion_pb2_grpc
from services.diffusion import converters, metadata
from services.diffusion.__main__ import build
from services.diffusion.scheduler_table import TABLE
from services.diffusion.settings import ModelSettings, Settings
from services.kit.server import ServiceServer
from tests.support import tiny_diffusion

pytestmark = pytest.mark.asyncio(loop_scope="module")

EVERY_STEP = pb.PreviewOptions(step_interval=1)


@dataclass
class Service:
    server: ServiceServer
    stub: Any

    def sample(self, name: str, **labels: str) -> float:
        """A value from the Prometheus registry, 0 before it was first set."""
        return self.server.metrics.registry.get_sample_value(name, labels) or 0.0


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Service]:
    root = tmp_path_factory.mktemp("models")
    settings = Settings(
        port=0,
        models={
            "small": ModelSettings(
                source=str(tiny_diffusion.make_folder(root / "small")),
                default_step_count=5,
                default_guidance_scale=1.5,
            ),
            "other": ModelSettings(
                source=str(tiny_diffusion.make_folder(root / "other", tiny_diffusion.PLAIN, preview=False))
            ),
        },
        threads=1,
        max_concurrent_calls=2,
        max_message_bytes=64 * 1024,
        max_side_px=128,
        max_pixels=128 * 64,
        max_image_count=4,
    )
    server = build(settings)
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            await server.wait_ready()
            yield Service(server, diffusion_pb2_grpc.DiffusionServiceStub(channel))
    finally:
        await server.stop(grace_s=0)


def request(**fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(**{"prompt": "red panda", "seed": 7, **fields})


async def events(call: Any) -> list[pb.GenerateResponse]:
    return [response async for response in call]


async def paint(service: Service, **fields: Any) -> pb.GenerateResult:
    last = (await events(service.stub.Generate(request(**fields))))[-1]
    assert last.WhichOneof("event") == "result"
    return last.result


async def refusal(service: Service, **fields: Any) -> tuple[grpc.StatusCode, dict[str, str], Any]:
    """Status code, field violations and ErrorInfo of a call that must fail."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await events(service.stub.Generate(request(**fields)))
    status = rpc_status.from_call(caught.value)
    assert status is not None
    violations: dict[str, str] = {}
    info = error_details_pb2.ErrorInfo()
    for detail in status.details:
        detail.Unpack(info)
        bad = error_details_pb2.BadRequest()
        if detail.Unpack(bad):
            violations = {violation.field: violation.description for violation in bad.field_violations}
    assert info.domain == "inkwell.dev"
    return caught.value.code(), violations, info


class TestGenerate:
    async def test_a_call_that_is_sent_again_is_not_painted_again(self, service: Service) -> None:
        unseeded = pb.GenerateRequest(prompt="red panda")  # so that every run paints another picture
        metadata = (("inkwell-request-id", str(uuid.uuid4())),)
        first = await events(service.stub.Generate(unseeded, metadata=metadata))
        assert await events(service.stub.Generate(unseeded, metadata=metadata)) == first
        other = await events(service.stub.Generate(unseeded))
        assert other[-1].result.images[0].image.content != first[-1].result.images[0].image.content

    async def test_tells_how_it_goes_and_ends_with_the_picture(self, service: Service) -> None:
        said = await events(service.stub.Generate(request(image_count=2, width=40, preview=EVERY_STEP)))
        assert [response.sequence for response in said] == list(range(1, len(said) + 1))
        kinds = [response.WhichOneof("event") for response in said]
        assert kinds[-1] == "result"
        assert kinds.count("result") == kinds.count("started") == 1
        assert [kind for kind in kinds if kind in ("progress", "preview")] == [
            *["progress", "preview"] * 4,
            "progress",  # the result follows
        ]
        assert kinds.index("started") < kinds.index("progress")
        assert [response.progress.step for response in said if response.HasField("progress")] == [1, 2, 3, 4, 5]
        assert {response.progress.step_count for response in said if response.HasField("progress")} == {5}
        started = next(response.started for response in said if response.HasField("started"))
        assert (started.hardware, started.model) == ("cpu", "small")
        assert started.runtime.startswith("torch")
        for preview in (response.preview for response in said if response.HasField("preview")):
            assert [image.media_type for image in preview.images] == ["image/jpeg"] * 2
            assert all(Image.open(io.BytesIO(image.content)).size == (40, 32) for image in preview.images)
        result = said[-1].result
        assert len(result.images) == 2
        assert result.timing.engine_ms > 0

    async def test_fills_in_and_embeds_every_parameter(self, service: Service) -> None:
        result = await paint(service, image_count=2, guidance_scale=7.1)
        for i, painted in enumerate(result.images):
            assert painted.parameters == pb.GenerationParameters(
                model="small",
                prompt="red panda",
                width=32,
                height=32,
                step_count=5,
                guidance_scale=7.1,
                scheduler="ddim",
                seed=7 + i,
                prompt_syntax=pb.PROMPT_SYNTAX_WEIGHTED,
            )
            embedded, text = metadata.read(painted.image.content)
            assert embedded.guidance_scale == 7.1
            assert converters.to_parameters(embedded) == painted.parameters
            assert text.splitlines()[-1] == (
                f"Steps: 5, Sampler: DDIM, CFG scale: 7.1, Seed: {7 + i}, Size: 32x32, Model: small"
            )

    async def test_a_picture_repeats_from_the_parameters_it_came_with(self, service: Service) -> None:
        first = (await paint(service, seed=None, scheduler="euler_ancestral", guidance_scale=3.3)).images[0]
        known = first.parameters
        again = await paint(
            service,
            **{field.name: value for field, value in known.ListFields()},
        )
        assert again.images[0].image.content == first.image.content

    async def test_without_a_seed_each_call_draws_another(self, service: Service) -> None:
        seeds = {(await paint(service, seed=None, step_count=1)).images[0].parameters.seed for _ in range(3)}
        assert len(seeds) == 3

    @pytest.mark.parametrize("media_type", ["image/png", "image/jpeg", "image/webp"])
    async def test_writes_the_media_type_asked_for(self, service: Service, media_type: str) -> None:
        quality = None if media_type == "image/png" else 50
        (painted,) = (await paint(service, output=pb.OutputOptions(media_type=media_type, quality=quality))).images
        assert painted.image.media_type == media_type
        image = Image.open(io.BytesIO(painted.image.content))
        assert Image.MIME[image.format or ""] == media_type
        assert metadata.read(painted.image.content)[0].seed == 7

    async def test_previews_come_at_the_interval_or_not_at_all(self, service: Service) -> None:
        some = await events(service.stub.Generate(request(preview=pb.PreviewOptions(step_interval=2))))
        assert [response.preview.step for response in some if response.HasField("preview")] == [2, 4]
        none = await events(service.stub.Generate(request(preview=pb.PreviewOptions(disabled=True))))
        assert not any(response.HasField("preview") for response in none)
        linear = pb.PreviewOptions(step_interval=1, method=pb.PREVIEW_METHOD_LINEAR, max_side_px=16)
        small = await events(service.stub.Generate(request(model="other", step_count=2, preview=linear)))
        (preview,) = (response.preview for response in small if response.HasField("preview"))
        assert Image.open(io.BytesIO(preview.images[0].content)).size == (16, 16)

    async def test_progress_comes_as_seldom_as_asked_for(self, service: Service) -> None:
        async def steps(**fields: Any) -> list[int]:
            told = await events(service.stub.Generate(request(step_count=5, **fields)))
            assert [response.sequence for response in told] == list(range(1, len(told) + 1))
            return [response.progress.step for response in told if response.HasField("progress")]

        assert await steps() == [1, 2, 3, 4, 5]
        assert await steps(progress_interval_ms=0) == [1, 2, 3, 4, 5]
        assert await steps(progress_interval_ms=3_600_000) == [1, 5]

    async def test_previews_are_few_when_nobody_says_how_often(self, service: Service) -> None:
        said = await events(service.stub.Generate(request(step_count=40)))
        assert sum(response.HasField("preview") for response in said) < 20

    async def test_warns_of_what_the_model_could_not_take_in(self, service: Service) -> None:
        result = await paint(service, prompt="abcdefghijklmnopq", step_count=1, prompt_syntax=pb.PROMPT_SYNTAX_PLAIN)
        assert list(result.warnings) == ["prompt: the model takes in 14 tokens; it did not see the end: 'opq'"]

    async def test_calls_over_the_limit_wait_and_hear_their_position(self, service: Service) -> None:
        running = [service.stub.Generate(request(step_count=200)) for _ in range(2)]
        for call in running:
            async for response in call:
                if response.HasField("progress"):
                    break
        waiting = service.stub.Generate(request(step_count=1))
        said: list[pb.GenerateResponse] = []
        async for response in waiting:
            if not said:
                assert response.HasField("queued")
                assert response.queued.position == 0
                for call in running:
                    call.cancel()
            said.append(response)
        assert [response.sequence for response in said] == list(range(1, len(said) + 1))
        assert said[-1].result.timing.queue_ms > 0


class TestCancel:
    async def test_a_cancelled_neighbour_changes_nothing(self, service: Service) -> None:
        alone = (await paint(service, step_count=12)).images[0].image.content
        cancelled_before = service.sample("inkwell_cancelled_total", phase="running")
        leaves = service.stub.Generate(request(step_count=50, seed=1))
        stays = asyncio.create_task(paint(service, step_count=12))
        async for response in leaves:
            if response.HasField("progress") and response.progress.step == 2:
                leaves.cancel()
                break
        assert (await stays).images[0].image.content == alone
        assert service.sample("inkwell_cancelled_total", phase="running") == cancelled_before + 1
        # Its place is free: this service has two, and both serve.
        both = await asyncio.gather(*(paint(service, step_count=12) for _ in range(2)))
        assert all(result.images[0].image.content == alone for result in both)

    async def test_neighbours_of_another_shape_change_nothing(self, service: Service) -> None:
        alone = await paint(service, scheduler="dpmpp_2m_sde", step_count=8)
        together = await asyncio.gather(
            paint(service, scheduler="dpmpp_2m_sde", step_count=8),
            paint(service, model="other", scheduler="heun", step_count=3, width=64, image_count=3, guidance_scale=5),
        )
        assert together[0].images == alone.images

    async def test_a_deadline_too_short_is_refused_or_ends_the_call(self, service: Service) -> None:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await events(service.stub.Generate(request(step_count=200, image_count=4), timeout=0.2))
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert len((await paint(service)).images) == 1


class TestLists:
    async def test_models(self, service: Service) -> None:
        small, other = (await service.stub.ListModels(pb.ListModelsRequest())).models
        assert small.parameter_count > 100_000
        assert small.file_bytes > 100_000
        assert small.memory_bytes >= small.parameter_count * 4
        assert {"image", "inpaint", "controls", "loras", "hires"} <= set(small.features)
        assert {"ddim", "euler"} <= set(small.schedulers)
        for field in ("parameter_count", "file_bytes", "memory_bytes", "features", "schedulers"):
            small.ClearField(field)
        assert small == pb.Model(
            name="small",
            state=common_pb2.MODEL_STATE_READY,
            hardware="cpu",
            runtime=small.runtime,
            dtype="float32",
            pipeline="StableDiffusionPipeline",
            default_width=32,
            default_height=32,
            size_multiple=8,
            default_step_count=5,
            default_guidance_scale=1.5,
            default_scheduler="ddim",
            prompt_token_limit=14,
            has_preview_autoencoder=True,
            is_default=True,
            precision="float32",
        )
        assert (other.name, other.is_default, other.has_preview_autoencoder) == ("other", False, False)

    async def test_schedulers(self, service: Service) -> None:
        listed = (await service.stub.ListSchedulers(pb.ListSchedulersRequest())).schedulers
        assert [scheduler.name for scheduler in listed] == list(TABLE)
        assert all(scheduler.diffusers_class.endswith("Scheduler") and scheduler.description for scheduler in listed)

    async def test_each_scheduler_of_the_list_paints_or_is_refused_by_name(self, service: Service) -> None:
        for scheduler in (await service.stub.ListSchedulers(pb.ListSchedulersRequest())).schedulers:
            family = {"flow": "flow matching", "edm": "EDM"}.get(TABLE[scheduler.name].family)
            if family is not None:
                code, violations, _ = await refusal(service, scheduler=scheduler.name)
                assert code is grpc.StatusCode.INVALID_ARGUMENT
                assert family in violations["scheduler"]
            else:
                result = await paint(service, scheduler=scheduler.name, step_count=2)
                assert result.images[0].parameters.scheduler == scheduler.name

    async def test_adapters_and_controls(self, service: Service) -> None:
        adapters = (await service.stub.ListAdapters(pb.ListAdaptersRequest())).adapters
        assert [(each.name, each.kind, list(each.models)) for each in adapters] == [
            ("fluent", pb.ADAPTER_KIND_LORA, ["emoji-tiny"])
        ]
        listed = await service.stub.ListControls(pb.ListControlsRequest())
        assert [(each.name, each.kind, each.preprocessor) for each in listed.models] == [
            ("edges", pb.CONTROL_KIND_CONTROLNET, "canny")
        ]
        names = [each.name for each in listed.preprocessors]
        assert "canny" in names
        assert "depth" not in names, "it needs a model that nobody configured"
        assert all(each.description for each in listed.preprocessors)


class TestFromAPicture:
    async def test_what_the_mask_leaves_out_comes_back_to_the_pixel(self, service: Service) -> None:
        photo = Image.effect_noise((32, 32), 80).convert("RGB")
        mask = Image.new("L", (32, 32), 0)
        mask.paste(255, (0, 0, 16, 32))
        result = await paint(service, image=sent(photo), inpaint=pb.Inpaint(mask=sent(mask), fill=pb.MASK_FILL_NOISE))
        painted = Image.open(io.BytesIO(result.images[0].image.content))
        right = (16, 0, 32, 32)
        assert painted.crop(right).tobytes() == photo.crop(right).tobytes()
        assert painted.tobytes() != photo.tobytes()
        parameters = result.images[0].parameters
        assert (parameters.strength, len(parameters.image_sha256), parameters.inpaint.fill) == (
            1.0,
            64,
            pb.MASK_FILL_NOISE,
        )
        assert metadata.read(result.images[0].image.content)[0].inpaint is not None

    async def test_its_own_size_is_the_default_and_strength_shortens_the_steps(self, service: Service) -> None:
        call = service.stub.Generate(
            request(width=None, height=None, image=sent(Image.new("RGB", (50, 44))), strength=0.4)
        )
        said = await events(call)
        assert [response.progress.step for response in said if response.HasField("progress")] == [1, 2]
        painted = Image.open(io.BytesIO(said[-1].result.images[0].image.content))
        assert painted.size == (48, 48)

    async def test_bad_input_is_named(self, service: Service) -> None:
        photo, small = sent(Image.new("RGB", (32, 32))), sent(Image.new("L", (16, 16), 255))
        for fields, field, says in (
            ({"image": photo, "inpaint": pb.Inpaint(mask=small)}, "inpaint.mask", "16x16 pixels and the image 32x32"),
            ({"image": common_pb2.Image(content=b"no picture")}, "image.content", "accepted: PNG"),
            ({"controls": [pb.Control(image=photo)] * 12}, "controls", "limit of 4"),
            ({"prompt": "((((("}, "prompt", "never closed"),
            ({"loras": [pb.Lora(name="nobody")]}, "loras[0].name", "one of: "),
            ({"loras": [pb.Lora(name="fluent")]}, "loras[0].name", "is for emoji-tiny, not for small"),
        ):
            code, violations, _ = await refusal(service, **fields)
            assert code in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND)
            assert says in violations[field]
        assert len((await paint(service)).images) == 1


def sent(image: Image.Image) -> common_pb2.Image:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return common_pb2.Image(content=buffer.getvalue())


class TestBadInput:
    """Each is refused before anything is admitted, names its field and limit, and the service goes on."""

    @pytest.mark.parametrize(
        ("fields", "field", "says"),
        [
            ({"step_count": 0}, "step_count", "1 to 200"),
            ({"step_count": 10_000}, "step_count", "1 to 200"),
            ({"step_count": -1}, "step_count", "1 to 200"),
            ({"width": 50}, "width", "nearest accepted: 48 or 56"),
            ({"height": 3}, "height", "nearest accepted: 8"),
            ({"width": 0}, "width", "nearest accepted: 8"),
            ({"height": 100_000}, "height", "nearest accepted: 128"),
            ({"width": 128, "height": 128}, "width, height", "height may be up to 64"),
            ({"prompt": "p" * 30_000}, "prompt", "limit of 8192"),
            ({"prompt": "nul\0"}, "prompt", "control characters"),
            ({"negative_prompt": "é" * 5000}, "negative_prompt", "10000 bytes"),
            ({"seed": -1}, "seed", "0 to 4294967295"),
            ({"seed": 2**32}, "seed", "0 to 4294967295"),
            ({"seed": 2**32 - 1, "image_count": 2}, "seed", "0 to 4294967294"),
            ({"image_count": 0}, "image_count", "1 to 4"),
            ({"image_count": -3}, "image_count", "1 to 4"),
            ({"image_count": 5}, "image_count", "1 to 4"),
            ({"guidance_scale": float("nan")}, "guidance_scale", "0 to 30"),
            ({"guidance_scale": -1}, "guidance_scale", "0 to 30"),
            ({"guidance_scale": 1e9}, "guidance_scale", "0 to 30"),
            ({"output": pb.OutputOptions(media_type="image/gif")}, "output.media_type", "image/webp"),
            ({"output": pb.OutputOptions(media_type="image/jpeg", quality=0)}, "output.quality", "1 to 100"),
            ({"output": pb.OutputOptions(quality=80)}, "output.quality", "PNG has no quality"),
            ({"preview": pb.PreviewOptions(step_interval=0)}, "preview.step_interval", "1 or more"),
            ({"progress_interval_ms": -1}, "progress_interval_ms", "0 to 3600000"),
            ({"progress_interval_ms": 3_600_001}, "progress_interval_ms", "0 to 3600000"),
        ],
    )
    async def test_of_one_field(self, service: Service, fields: dict[str, Any], field: str, says: str) -> None:
        admitted = service.sample("inkwell_queue_seconds_count")
        code, violations, info = await refusal(service, **fields)
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert list(violations) == [field]
        assert says in violations[field]
        assert info.reason == "INVALID_FIELD"
        assert service.sample("inkwell_queue_seconds_count") == admitted

    async def test_several_wrong_fields_are_all_named(self, service: Service) -> None:
        code, violations, _ = await refusal(
            service, step_count=0, width=33, scheduler="magic", output=pb.OutputOptions(media_type="text/html")
        )
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert set(violations) == {"step_count", "width", "scheduler", "output.media_type"}

    async def test_an_unknown_model(self, service: Service) -> None:
        code, violations, info = await refusal(service, model="stable-confusion")
        assert (code, info.reason) == (grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND")
        assert violations == {"model": "one of: other, small"}

    async def test_an_unknown_scheduler(self, service: Service) -> None:
        code, violations, info = await refusal(service, scheduler="magic")
        assert (code, info.reason) == (grpc.StatusCode.NOT_FOUND, "SCHEDULER_NOT_FOUND")
        assert "euler_ancestral" in violations["scheduler"]

    async def test_a_message_over_the_limit(self, service: Service) -> None:
        code, violations, info = await refusal(service, prompt="p" * 100_000)
        assert (code, info.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "MESSAGE_TOO_LARGE")
        assert "65536" in violations["message"]

    async def test_a_prompt_that_a_jpeg_cannot_carry(self, service: Service) -> None:
        emoji = "\N{PARTY POPPER}" * 2048
        jpeg = pb.OutputOptions(media_type="image/jpeg")
        plain = pb.PROMPT_SYNTAX_PLAIN
        code, violations, _ = await refusal(
            service, prompt=emoji, negative_prompt=emoji, output=jpeg, prompt_syntax=plain
        )
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert "take image/png" in violations["prompt"]
        result = await paint(service, prompt=emoji, negative_prompt=emoji, step_count=1, prompt_syntax=plain)
        assert metadata.read(result.images[0].image.content)[0].prompt == emoji

    async def test_the_service_goes_on(self, service: Service) -> None:
        await refusal(service, step_count=0)
        assert len((await paint(service)).images) == 1


class TestMetrics:
    async def test_steps_and_first_progress_are_measured(self, service: Service) -> None:
        steps = service.sample("inkwell_denoise_step_seconds_count", model="small")
        calls = service.sample("inkwell_first_progress_seconds_count")
        await paint(service, step_count=6)
        assert service.sample("inkwell_denoise_step_seconds_count", model="small") == steps + 6
        assert service.sample("inkwell_first_progress_seconds_count") == calls + 1


class TestEngineLost:
    async def test_a_killed_engine_ends_its_calls_and_comes_back(self, service: Service) -> None:
        expected = (await paint(service)).images[0].image.content
        call = service.stub.Generate(request(step_count=200))
        async for response in call:
            if response.HasField("progress"):
                break
        host = service.server.host
        assert host is not None
        assert host.pid is not None
        os.kill(host.pid, signal.SIGKILL)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await events(call)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        status = rpc_status.from_call(caught.value)
        assert status is not None
        assert any(detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR) for detail in status.details)
        models = (await service.stub.ListModels(pb.ListModelsRequest())).models
        assert {model.state for model in models} == {common_pb2.MODEL_STATE_LOADING}
        await service.server.wait_ready()
        assert (await paint(service)).images[0].image.content == expected


async def test_before_the_engine_is_ready_models_are_loading_and_calls_refused() -> None:
    server = build(Settings(port=0, models={"absent": ModelSettings(source="/nowhere")}))
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            stub = diffusion_pb2_grpc.DiffusionServiceStub(channel)
            (model,) = (await stub.ListModels(pb.ListModelsRequest())).models
            assert model == pb.Model(name="absent", state=common_pb2.MODEL_STATE_LOADING, is_default=True)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await events(stub.Generate(request()))
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    finally:
        await server.stop(grace_s=0)


async def test_the_front_process_holds_no_model() -> None:
    heavy = "torch transformers diffusers numpy cv2"
    code = f"import sys, services.diffusion.__main__; print([m for m in '{heavy}'.split() if m in sys.modules])"
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=subprocess.PIPE)
    printed, _ = await process.communicate()
    assert printed.decode().strip() == "[]"
