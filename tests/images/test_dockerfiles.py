"""What every image promises, checked on the Dockerfiles themselves."""

import ast
import importlib
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import inkwell
from services.kit.settings import ServiceSettings
from tests.images import dockerfile
from tests.images.dockerfile import HARDWARE, MODEL_SERVICES, ROOT, SERVICES, Dockerfile


def _pins(*paths: Path) -> set[str]:
    """Names of what requirements files pin."""
    lines = "\n".join(path.read_text("utf-8") for path in paths)
    return {canonicalize_name(name) for name in re.findall(r"^([\w.-]+)==", lines, re.MULTILINE)}


_PINS = _pins(*(ROOT / "requirements").glob("*.txt"))  # as the stage `wheel` joins them
_ML = {
    "torch",
    "transformers",
    "diffusers",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "nncf",
    "tritonclient",
}
# Not installed here, so nobody can tell what they need; it is numpy, protobuf and the like.
_ONLY_IN_IMAGES = _pins(ROOT / "requirements" / "images.txt")
_IMAGES = [(service, hardware) for service in MODEL_SERVICES for hardware in HARDWARE] + [("gateway", "cpu")]


def settings_of(service: str) -> type[ServiceSettings]:
    """The settings class of a service."""
    found: type[ServiceSettings] = importlib.import_module(f"services.{service}.settings").Settings
    return found


@pytest.mark.parametrize("service", SERVICES)
def test_hadolint_finds_nothing(service: str) -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    found = subprocess.run(
        [hadolint, "--no-color", ROOT / "services" / service / "Dockerfile"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (found.returncode, found.stdout + found.stderr) == (0, "")


@pytest.mark.parametrize("service", SERVICES)
def test_there_is_an_image_for_each_hardware_and_the_last_is_for_the_cpu(service: str) -> None:
    names = [name for name in dockerfile.read(service).stages if name in HARDWARE]
    assert set(names) == ({"cpu"} if service == "gateway" else set(HARDWARE))
    assert names[-1] == list(dockerfile.read(service).stages)[-1] == "cpu"


def test_all_are_built_on_one_image_which_a_digest_pins() -> None:
    bases = {
        stage.base
        for service in SERVICES
        for file in [dockerfile.read(service)]
        for stage in file.stages.values()
        if stage.base not in file.stages
    }
    assert len(bases) == 1
    name, _, digest = bases.pop().partition("@")
    assert re.fullmatch(r"python:3\.11\.\d+-slim-bookworm", name)
    assert re.fullmatch(r"sha256:[0-9a-f]{64}", digest)
    for service, hardware in _IMAGES:
        labels = dockerfile.read(service).labels(hardware)
        assert labels["org.opencontainers.image.base.name"] == f"docker.io/library/{name}"
        assert labels["org.opencontainers.image.base.digest"] == digest


@pytest.mark.parametrize("service", MODEL_SERVICES)
def test_stages_that_do_the_same_in_several_files_are_the_same(service: str) -> None:
    ocr, other = dockerfile.read("ocr").stages, dockerfile.read(service).stages
    for name in ("base", "wheel", "libraries"):
        assert other[name] == ocr[name]
        assert dockerfile.read("gateway").stages[name] == ocr[name]
    for name in ("libraries-cpu", "libraries-cuda", "libraries-rocm"):
        # The compiler adds its extra; the bill of materials has the image's name.
        def plain(text: str) -> str:
            return re.sub(r"inkwell-[a-z]+-|,compiler$", "", text)

        assert [plain(i.text) for i in other[name].instructions] == [plain(i.text) for i in ocr[name].instructions]


@pytest.mark.parametrize(("service", "hardware"), _IMAGES)
def test_it_runs_its_service_as_nobody_in_particular(service: str, hardware: str) -> None:
    file = dockerfile.read(service)
    assert file.of(hardware, "USER")[-1].text == "10001:10001"
    assert [i.words() for i in file.of(hardware, "ENTRYPOINT")] == [["python3", "-m", f"services.{service}"]]
    assert not file.of(hardware, "HEALTHCHECK")
    assert not file.of(hardware, "CMD")
    # Root's work ends before USER; what comes after it is neither run nor copied from the context.
    words = [i.word for stage in file.chain(hardware) for i in stage.instructions]
    after = words[words.index("USER") :]
    assert "RUN" not in after
    assert after.count("COPY") == 1  # of the libraries


@pytest.mark.parametrize(("service", "hardware"), _IMAGES)
def test_nothing_is_installed_in_an_image_but_the_environment_that_another_stage_made(
    service: str, hardware: str
) -> None:
    file = dockerfile.read(service)
    ran = "\n".join(instruction.text for instruction in file.of(hardware, "RUN"))
    assert not re.search(r"apt|dpkg|pip|curl|wget|gcc|make", ran)
    from_stages = [i for i in file.of(hardware, "COPY") if "from" in i.flags]
    assert [(i.flags["from"], i.words()) for i in from_stages] == [
        (f"libraries-{hardware}", ["/opt/venv", "/opt/venv"])
    ]


@pytest.mark.parametrize(("service", "hardware"), _IMAGES)
def test_it_sets_what_the_service_reads_and_nothing_that_lets_anybody_in(
    service: str, hardware: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, settings = dockerfile.read(service), settings_of(service)
    prefix = f"INKWELL_{service.upper()}_"
    ours = {key: value for key, value in file.environment(hardware).items() if key.startswith("INKWELL_")}
    for key, value in ours.items():
        assert key.removeprefix(prefix).lower() in settings.model_fields
        monkeypatch.setenv(key, value)
    with pytest.raises(ValueError, match=f"set {prefix}TLS to a folder"):
        settings()
    monkeypatch.setenv(f"{prefix}TLS", "off")
    if service == "gateway":
        monkeypatch.setenv(f"{prefix}ACCESS", "off")
    told = settings()
    assert [i.words() for i in file.of(hardware, "EXPOSE")] == [[str(told.port), str(told.metrics_port)]]


@pytest.mark.parametrize(("service", "hardware"), _IMAGES)
def test_its_labels_say_what_it_is(service: str, hardware: str) -> None:
    labels = dockerfile.read(service).labels(hardware)
    assert labels["org.opencontainers.image.title"] == f"inkwell-{service}"
    assert labels["org.opencontainers.image.version"] == inkwell.__version__
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"
    assert labels["org.opencontainers.image.revision"] == "unknown"  # unless the build says
    assert labels["dev.inkwell.hardware"] == hardware
    made = dockerfile.read(service).of(f"libraries-{hardware}", "RUN")[-1].text
    assert made.endswith(f"requirements/sbom.py inkwell-{service}-{hardware} > {labels['dev.inkwell.sbom']}")


# --- what is copied ---


@pytest.mark.parametrize("service", SERVICES)
def test_what_is_copied_from_the_checkout_is_there_and_let_in(service: str) -> None:
    ignore = dockerfile.ignore()
    for source in _copied(dockerfile.read(service), *dockerfile.read(service).stages):
        place = ROOT / source
        assert place.exists(), source
        inside = next(path for path in [place, *place.rglob("*")] if path.is_file())
        assert ignore.lets_in(PurePosixPath(inside.relative_to(ROOT))), inside


@pytest.mark.parametrize(
    "path",
    [
        ".git/config",
        ".run/up.json",
        ".venv/bin/python",
        "tests/images/dockerfile.py",
        "docs/install.md",
        "inkwell/ocr/v1/ocr_pb2.py",
        "models/recipes/emoji_tiny/train.py",
        "services/kit/__pycache__/server.cpython-311.pyc",
        "services/ocr/Dockerfile",
        "services/local.py",
        "id_rsa",
    ],
)
def test_what_no_image_needs_stays_out_of_the_context(path: str) -> None:
    assert not dockerfile.ignore().lets_in(PurePosixPath(path))


@pytest.mark.parametrize("service", SERVICES)
def test_every_module_that_the_program_imports_is_in_the_image(service: str) -> None:
    sources = _copied(dockerfile.read(service), "service")
    files = {path for source in sources for path in _python_files(ROOT / source)}
    assert ROOT / "services" / service / "__main__.py" in files
    missing = {
        f"{path.relative_to(ROOT)} imports {module}"
        for path in files
        for module in _own_imports(path)
        if not {ROOT / (stem := module.replace(".", "/") + ".py"), (ROOT / stem).with_suffix("") / "__init__.py"}
        & files
    }
    assert not missing


@pytest.mark.parametrize("service", MODEL_SERVICES)
def test_the_embedded_models_that_it_serves_are_in_the_image(service: str) -> None:
    copied = _copied(dockerfile.read(service), "service")
    settings = settings_of(service)()
    needed = set(re.findall(r"/models/([\w-]+)", settings.model_dump_json()))
    assert needed
    assert needed == {PurePosixPath(source).name for source in copied if source.startswith("models/")}


def _copied(file: Dockerfile, *stages: str) -> list[str]:
    """What the stages take from the checkout."""
    return [
        source
        for stage in stages
        for instruction in file.stages[stage].of("COPY")
        if "from" not in instruction.flags
        for source in instruction.words()[:-1]
    ]


def _python_files(place: Path) -> Iterator[Path]:
    return iter([place]) if place.is_file() else place.rglob("*.py")


def _own_imports(path: Path) -> set[str]:
    """Modules of `services` that a file imports anywhere in it; of `from package import name` the package."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module)
    return {module for module in found if module.startswith("services.")}


# --- what is installed ---


@pytest.mark.parametrize(("service", "hardware"), [*_IMAGES, ("finetune", "cpu")])
def test_every_library_has_one_version(service: str, hardware: str) -> None:
    assert _closure(_extras(service, hardware)) <= _PINS


@pytest.mark.parametrize("hardware", HARDWARE)
def test_hardware_decides_what_computes(hardware: str) -> None:
    file = dockerfile.read("ocr")
    index = dict(i.text.split("=", 1) for i in file.stages[f"libraries-{hardware}"].of("ARG"))["TORCH_INDEX"]
    assert index.startswith("https://download.pytorch.org/whl/")
    assert {"cpu": "cpu", "cuda": "cu130", "rocm": "rocm7.2"}[hardware] == index.rpartition("/")[2]
    installed = _closure(_extras("ocr", hardware))
    assert ("onnxruntime-gpu" in installed) == ("tensorrt" in installed) == (hardware == "cuda")
    # Both would be the same Python module.
    assert ("onnxruntime" in installed) == (hardware != "cuda")


def test_the_gateway_has_no_ml_library() -> None:
    assert not _closure(_extras("gateway", "cpu")) & {*_ML, "numpy"}
    assert not {
        source
        for source in _copied(dockerfile.read("gateway"), "service")
        if "models" in source or "runtimes" in source
    }
    assert "torch" not in "\n".join(i.text for i in dockerfile.read("gateway").of("libraries-cpu", "RUN")[2:])
    assert _closure(_extras("ocr", "cpu")) & _ML  # it would be noticed


def _extras(service: str, hardware: str) -> list[str]:
    """Of the package inkwell, as the image installs them."""
    if service == "finetune":
        return [hardware, "finetune"]
    stage = dockerfile.read(service).stages[f"libraries-{hardware}"]
    return dict(i.text.split("=", 1) for i in stage.of("ARG"))["EXTRAS"].split(",")


def _closure(extras: list[str]) -> set[str]:
    """Names of all distributions that these extras of inkwell bring, without those that torch brings along."""
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    wanted = [Requirement(line) for line in project["dependencies"]]
    todo, seen = list(extras), set[str]()
    while todo:
        extra = todo.pop()
        for line in project["optional-dependencies"][extra]:
            requirement = Requirement(line)
            if requirement.name == "inkwell":
                todo += requirement.extras
            else:
                wanted.append(requirement)
    names: set[str] = set()
    while wanted:
        requirement = wanted.pop()
        name = str(canonicalize_name(requirement.name))
        key = f"{name}[{','.join(sorted(requirement.extras))}]"
        if key in seen:
            continue
        seen.add(key)
        names.add(name)
        if name == "torch" or name in _ONLY_IN_IMAGES:
            continue
        for line in importlib.metadata.requires(name) or []:
            needed = Requirement(line)
            if needed.marker is None or any(
                needed.marker.evaluate({"extra": extra}) for extra in {"", *requirement.extras}
            ):
                wanted.append(needed)
    return names
