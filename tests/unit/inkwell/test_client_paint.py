"""Painting, and the lists, with the blocking client."""

from pathlib import Path

import pytest

import inkwell
from tests.unit.inkwell.fake_server import TIMEOUT_S, InkwellServer


def test_the_readme_example_works_as_it_stands(
    server: InkwellServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("line.png").write_bytes(b"say hello")
    with inkwell.Client(server.address) as client:
        print(client.read("line.png").text)
        client.paint("grinning face", seed=7)[0].save("face.png")
    assert capsys.readouterr().out == "hello\n"
    assert inkwell.embedded_parameters("face.png").seed == 7


def test_a_picture_knows_what_it_was_painted_with(client: inkwell.Client) -> None:
    (picture,) = client.paint("a cat", negative_prompt="a dog", steps=5, width=32, height=24, seed=9)
    assert picture.media_type == "image/png"
    assert picture.content.startswith(b"\x89PNG")
    assert picture.parameters == inkwell.GenerationParameters(
        model="brush", prompt="a cat", negative_prompt="a dog", width=32, height=24, step_count=5,
        guidance_scale=2.5, scheduler="euler", seed=9, prompt_syntax=inkwell.PromptSyntax.WEIGHTED,
    )  # fmt: skip
    assert picture.served_by == inkwell.ServedBy("cpu", "torch", "pool-a", "10.0.0.1:1")
    assert picture.warnings == ()


def test_several_pictures_come_in_order(client: inkwell.Client) -> None:
    pictures = client.paint("a cat", image_count=3, seed=5)
    assert [picture.parameters.seed for picture in pictures] == [5, 6, 7]


def test_warnings_reach_the_caller(client: inkwell.Client) -> None:
    (picture,) = client.paint("long " * 100)
    assert picture.warnings == ("the prompt was cut off after 77 tokens",)


def test_only_options_that_were_given_are_sent(client: inkwell.Client, server: InkwellServer) -> None:
    list(client.paint_stream("a cat"))
    client.paint(
        "a cat", negative_prompt="n", model="m", width=8, height=16, steps=3, guidance_scale=0.0, scheduler="ddim",
        seed=0, image_count=1, media_type="image/webp", quality=80, previews=True,
    )  # fmt: skip
    plain, full = server.requests
    assert [field.name for field, _ in plain.ListFields()] == ["prompt", "preview"]
    assert plain.preview.disabled
    assert not full.preview.disabled
    assert (full.prompt, full.negative_prompt, full.model, full.scheduler) == ("a cat", "n", "m", "ddim")
    assert (full.width, full.height, full.step_count, full.image_count) == (8, 16, 3, 1)
    # Zeros are sent, not taken for "unset".
    assert full.HasField("seed")
    assert full.HasField("guidance_scale")
    assert (full.output.media_type, full.output.quality) == ("image/webp", 80)


@pytest.mark.parametrize(
    ("option", "field"), [("seed", "seed"), ("steps", "step_count"), ("quality", "output.quality")]
)
def test_what_protobuf_cannot_carry_is_refused_by_name(client: inkwell.Client, option: str, field: str) -> None:
    with pytest.raises(inkwell.InvalidRequest) as raised:
        client.paint("a cat", **{option: 2**70})  # type: ignore[arg-type]
    assert raised.value.fields[0].field == field


def test_events_tell_the_whole_story(client: inkwell.Client) -> None:
    events = list(client.paint_stream("a cat", steps=2, previews=True))
    assert [event.sequence for event in events] == list(range(1, 8))
    assert events[0] == inkwell.Queued(1, position=3)
    assert events[1] == inkwell.Started(2, hardware="cpu", runtime="torch", model="brush")
    assert events[2] == inkwell.Progress(3, step=1, step_count=2, eta_ms=100)
    assert isinstance(events[3], inkwell.Preview)
    assert events[3].step == 1
    assert events[3].images[0].media_type == "image/jpeg"
    assert events[3].images[0].content.startswith(b"\xff\xd8")
    assert isinstance(events[6], inkwell.PaintResult)
    assert events[6].timing == inkwell.Timing(0.5, 2000)


def test_there_are_no_previews_unless_asked_for(client: inkwell.Client) -> None:
    seen: list[inkwell.PaintEvent] = []
    client.paint("a cat", steps=3, on_event=seen.append)
    assert not any(isinstance(event, inkwell.Preview) for event in seen)
    assert sum(isinstance(event, inkwell.Progress) for event in seen) == 3


def test_progress_that_nobody_looks_at_is_not_asked_for(client: inkwell.Client, server: InkwellServer) -> None:
    client.paint("a cat", steps=3)
    client.paint("a cat", steps=3, on_event=lambda event: None)
    client.paint("a cat", steps=3, progress_interval_ms=40)
    alone, watched, chosen = server.requests[-3:]
    assert alone.progress_interval_ms == 3_600_000
    assert not watched.HasField("progress_interval_ms")
    assert chosen.progress_interval_ms == 40


def test_closing_the_iterator_cancels_the_call_at_the_server(client: inkwell.Client, server: InkwellServer) -> None:
    for event in client.paint_stream("hold"):
        if isinstance(event, inkwell.Progress) and event.step == 2:
            assert server.held.wait(TIMEOUT_S)
            break
    assert server.cancelled.wait(TIMEOUT_S)


def test_a_stream_without_a_result_is_the_servers_fault(client: inkwell.Client, server: InkwellServer) -> None:
    server.end_without_result = True
    with pytest.raises(inkwell.InternalError, match="without a result"):
        client.paint("a cat")


def test_saving_replaces_the_whole_file_and_keeps_its_permissions(client: inkwell.Client, tmp_path: Path) -> None:
    path = tmp_path / "face.png"
    path.write_bytes(b"older and much longer than nothing")
    path.chmod(0o640)
    (picture,) = client.paint("a cat")
    assert picture.save(path) == path
    assert path.read_bytes() == picture.content
    assert path.stat().st_mode & 0o777 == 0o640
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_save_leaves_nothing_behind(client: inkwell.Client, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (picture,) = client.paint("a cat")
    with pytest.raises(OSError, match="taken"):
        picture.save(tmp_path / "taken")
    assert list(tmp_path.iterdir()) == [tmp_path / "taken"]


def test_models_of_all_services_are_listed(client: inkwell.Client) -> None:
    reader, painter = client.models()
    assert reader == inkwell.OcrModel(
        name="pen", state=inkwell.ModelState.READY, hardware="cpu", runtime="torch", dtype="float32",
        parameter_count=7_000_000, is_default=True, max_new_token_limit=128,
        default_decoding=inkwell.Decoding(
            beam_width=4, hypothesis_count=1, length_penalty=1.0, max_new_token_count=64, no_repeat_ngram_size=0,
            early_stopping=inkwell.EarlyStopping.NEVER,
        ),
        precision=inkwell.Precision.INT8_DYNAMIC, weight_bytes=7_500_000, languages=("en", "de"),
        confidence_calibrated=True, embedding_width=192,
    )  # fmt: skip
    assert isinstance(painter, inkwell.DiffusionModel)
    assert (painter.state, painter.size_multiple) == (inkwell.ModelState.LOADING, 8)
    assert (painter.file_bytes, painter.memory_bytes, painter.vaes) == (36_000_000, 18_000_000, ("sharp",))
    assert (painter.features, painter.schedulers) == (("image", "loras"), ("euler", "ddim"))
    assert client.models("ocr") == [reader]
    assert client.models("diffusion") == [painter]


@pytest.mark.parametrize("only", ["ocr", "diffusion"])
def test_a_service_called_directly_has_only_its_own_models(only: str) -> None:
    server = InkwellServer(ocr=only == "ocr", diffusion=only == "diffusion", gateway=False)
    try:
        with inkwell.Client(server.address) as client:
            assert [model.name for model in client.models()] == ["pen" if only == "ocr" else "brush"]
            with pytest.raises(inkwell.Unimplemented, match=server.address):
                client.fleet()
    finally:
        server.stop()


def test_schedulers_are_listed(client: inkwell.Client) -> None:
    assert client.schedulers()[1] == inkwell.Scheduler("ddim", "DDIM", "Take ddim.", ("Ddim", "ddim a"), ("eta",))


def test_adapters_are_listed(client: inkwell.Client) -> None:
    flat, cat, ip, later = client.adapters()
    assert flat == inkwell.Adapter("flat", inkwell.AdapterKind.LORA, ("brush",), 1_500_000)
    assert (cat.kind, cat.models) == (inkwell.AdapterKind.TEXTUAL_INVERSION, ())
    assert (ip.kind, ip.models) == ("image_prompt", ("brush", "other"))
    assert later.kind is inkwell.AdapterKind.UNKNOWN


def test_controls_and_preprocessors_are_listed(client: inkwell.Client) -> None:
    assert client.controls() == inkwell.Controls(
        models=(
            inkwell.ControlModel("edges", inkwell.ControlKind.CONTROLNET, ("brush",), "canny"),
            inkwell.ControlModel("sketch", inkwell.ControlKind.T2I_ADAPTER, (), ""),
        ),
        preprocessors=(inkwell.Preprocessor("canny", "Thin lines along edges."),),
    )


def test_the_fleet_is_listed(client: inkwell.Client) -> None:
    ocr, paint = client.fleet()
    assert (ocr.name, ocr.service, ocr.hardware, ocr.targets) == ("ocr-cpu", "ocr", "cpu", ("dns:///ocr:50051",))
    assert ocr.endpoints[0] == inkwell.Endpoint(
        "10.0.0.1:50051", inkwell.EndpointState.READY, 2, 40, 0, "", version="0.1.0"
    )
    assert ocr.endpoints[1].state is inkwell.EndpointState.UNREACHABLE
    assert ocr.endpoints[1].last_error == "connection refused"
    assert paint.endpoints == ()
    assert client.fleet(service="ocr") == [ocr]
    assert client.fleet(hardware="cuda") == [paint]
