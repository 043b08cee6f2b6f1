"""Builds a stage of a Dockerfile without a container engine, in folders, and starts what its image would start.

The instructions are those of the file, word for word: RUN is run, COPY copied, ENV and ARG are set. What differs from
an engine: Debian's own bookworm with its Python 3.11 (debootstrap) is in place of python:3.11-slim-bookworm, which is
the same Debian with a Python of a later patch level; and the machine's network, name service and certificates are used.
Needs root, because of chroot and mounts; each command has mounts and processes of its own, gone when it ends.
"""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import psutil

from tests.images import dockerfile
from tests.images.dockerfile import ROOT, Dockerfile, Instruction, Stage

_MIRROR = "http://deb.debian.org/debian"
_PACKAGES = ("ca-certificates", "python3", "python3-venv")
_CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
# As an engine gives it to a container whose image sets none.
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass
class Image:
    """What came of a stage: a root folder, and how its program is started."""

    root: Path
    environment: dict[str, str] = field(default_factory=lambda: {"PATH": _PATH})
    folder: str = "/"
    user: str = "0:0"
    entrypoint: list[str] = field(default_factory=list)


def debian(root: Path) -> None:
    """Make the folder that stands for the base image; takes a minute or two, and 60 MB from a Debian mirror."""
    subprocess.run(
        ["debootstrap", "--variant=minbase", f"--include={','.join(_PACKAGES)}", "bookworm", root, _MIRROR], check=True
    )
    # The machine may see the world through a proxy with an authority of its own.
    shutil.copy(_CERTIFICATES, root / _CERTIFICATES.relative_to("/"))
    for name in ("resolv.conf", "hosts"):
        shutil.copy(Path("/etc") / name, root / "etc" / name)


class Builder:
    """Builds stages of one file, each once."""

    def __init__(self, file: Dockerfile, base: Path, work: Path, *, arguments: dict[str, str]) -> None:
        """base: folder in place of the image that FROM names. work: where stages are made. arguments: as --build-arg.

        Beside `work`, `cache` is kept for several builds, and pip takes what it finds in `wheels`.
        """
        self._file = file
        self._base = base
        self._work = work
        self._arguments = arguments
        self._ignore = dockerfile.ignore()
        self._cache = work.parent / "cache"
        self._wheels = work.parent / "wheels"
        for folder in (work, self._cache, self._wheels):
            folder.mkdir(exist_ok=True)
        self._built: dict[str, Image] = {}

    def build(self, name: str) -> Image:
        """The image of a stage. Raises CalledProcessError when a command of it fails."""
        if name not in self._built:
            stage = self._file.stages[name]
            image = self._start_of(stage)
            values = dict[str, str]()
            for instruction in stage.instructions:
                self._carry_out(instruction, image, values)
            self._built[name] = image
        return self._built[name]

    def _start_of(self, stage: Stage) -> Image:
        root = self._work / stage.name
        if stage.base not in self._file.stages:
            _copy_tree(self._base, root)
            return Image(root)
        on = self.build(stage.base)
        _copy_tree(on.root, root)
        return Image(root, dict(on.environment), on.folder, on.user, list(on.entrypoint))

    def _carry_out(self, instruction: Instruction, image: Image, values: dict[str, str]) -> None:
        match instruction.word:
            case "ARG":
                name, _, default = instruction.text.partition("=")
                values[name] = self._arguments.get(name, default)
            case "ENV":
                image.environment |= {key: value for key, _, value in (w.partition("=") for w in instruction.words())}
            case "WORKDIR":
                image.folder = instruction.text
                _inside(image, image.folder).mkdir(parents=True, exist_ok=True)
            case "USER":
                image.user = instruction.text
            case "ENTRYPOINT":
                image.entrypoint = instruction.words()
            case "COPY":
                self._copy(instruction, image)
            case "RUN":
                self._run(instruction, image, values)
            case "LABEL" | "EXPOSE":
                pass  # nothing of the folder
            case other:
                raise AssertionError(f"the test knows no instruction {other}")

    def _run(self, instruction: Instruction, image: Image, values: dict[str, str]) -> None:
        binds = {self._wheels: "/wheels-of-this-machine"}
        mount = dict(part.split("=") for part in instruction.flags.get("mount", "").split(",") if part)
        if mount:
            assert mount["type"] == "cache"
            binds[self._cache] = mount["target"]
        # For pip to trust whom the machine trusts.
        environment = {**image.environment, **values, **_pip_of_this_machine()}
        subprocess.run(_command(image, ["sh", "-c", instruction.text], environment, binds), check=True)

    def _copy(self, instruction: Instruction, image: Image) -> None:
        *sources, target = instruction.words()
        place = _inside(image, target)
        for source in sources:
            if "from" in instruction.flags:
                _copy_tree(_inside(self.build(instruction.flags["from"]), source), place)
            elif (ROOT / source).is_dir():
                self._copy_of_context(Path(source), place)
            else:
                into = place / Path(source).name if len(sources) > 1 or target.endswith("/") else place
                into.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / source, into)

    def _copy_of_context(self, source: Path, place: Path) -> None:
        for path in (ROOT / source).rglob("*"):
            if path.is_file() and self._ignore.lets_in(PurePosixPath(path.relative_to(ROOT))):
                into = place / path.relative_to(ROOT / source)
                into.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, into)
                shutil.copymode(path, into)


@dataclass
class Running:
    """A program that was started by `running`."""

    outside: subprocess.Popen[bytes]

    @property
    def process(self) -> psutil.Process:
        """The program itself: unshare became its parent, and all that is in between became it."""
        (child,) = psutil.Process(self.outside.pid).children()
        return child

    def stop(self) -> int:
        """SIGTERM, and its exit code once it has drained."""
        self.process.terminate()
        return self.outside.wait(timeout=60)


@contextmanager
def running(image: Image, settings: dict[str, str], *, log: Path) -> Iterator[Running]:
    """The image's program, as its user, the first process of its own, on a root that cannot be written to.

    Only its home and /tmp can. It is killed in the end if it still runs.
    """
    with log.open("wb") as output:
        outside = subprocess.Popen(_started(image, settings), stdout=output, stderr=subprocess.STDOUT)
    try:
        yield Running(outside)
    finally:
        outside.kill()  # --kill-child takes the rest along
        outside.wait()


def ended_by_itself(image: Image, settings: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """The image's program, when it is expected to refuse to run; within a minute."""
    return subprocess.run(_started(image, settings), capture_output=True, text=True, check=False, timeout=60)


def python(image: Image, code: str) -> subprocess.CompletedProcess[str]:
    """Run some Python where the image's program would run, as its user."""
    command = _started(image, {}, [image.entrypoint[0], "-c", code])
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def _started(image: Image, settings: dict[str, str], command: list[str] | None = None) -> list[str]:
    environment = image.environment | settings
    return _command(image, command or image.entrypoint, environment, {}, read_only=True, home=environment["HOME"])


def _command(
    image: Image,
    command: list[str],
    environment: dict[str, str],
    binds: dict[Path, str],
    *,
    read_only: bool = False,
    home: str = "",
) -> list[str]:
    """What runs a command in the folder, with mounts and process numbers of its own."""
    root = shlex.quote(str(image.root))
    steps = [f"mount --bind {root} {root}"]
    for source, target in binds.items():
        inside = shlex.quote(str(_inside(image, target)))
        steps += [f"mkdir -p {inside}", f"mount --bind {shlex.quote(str(source))} {inside}"]
    if read_only:
        steps += [
            f"mount -o remount,ro,bind {root}",
            f"mount -t tmpfs -o mode=1777 tmpfs {root}/tmp",
            f"mount -t tmpfs -o mode=0700,uid=10001,gid=10001 tmpfs {root}{home}",
        ]
    steps += [f"mount -t proc proc {root}/proc", f"mount --rbind /dev {root}/dev"]
    named = " ".join(shlex.quote(f"{key}={value}") for key, value in environment.items())
    inner = f"cd {shlex.quote(image.folder)} && exec {shlex.join(command)}"
    steps.append(
        f"exec chroot --userspec={image.user} --groups= {root} /usr/bin/env -i {named} /bin/sh -c {shlex.quote(inner)}"
    )
    return ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", " && ".join(steps)]


def _inside(image: Image, place: str) -> Path:
    """The folder's own path of a place in it; relative ones are below its working folder."""
    return image.root / str(PurePosixPath(image.folder) / place).lstrip("/")


def _copy_tree(source: Path, target: Path) -> None:
    """With owners, modes and links, sharing blocks where the file system can."""
    target.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(["cp", "--archive", "--reflink=auto", source, target], check=True)


def _pip_of_this_machine() -> dict[str, str]:
    return {
        "PIP_CERT": str(_CERTIFICATES),
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PIP_FIND_LINKS": "/wheels-of-this-machine",
        "PIP_PROGRESS_BAR": "off",
    }


def download_torch(into: Path) -> None:
    """Fetch what requirements/torch.txt pins, the way this machine's pip is set up to, or from TORCH_INDEX."""
    index = os.environ.get("TORCH_INDEX", "")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(into)]
    pinned = ["--requirement", str(ROOT / "requirements" / "torch.txt")]
    subprocess.run([*command, *(["--index-url", index] if index else []), *pinned], check=True)
