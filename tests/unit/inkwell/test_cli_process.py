"""The `inkwell` command as a process of its own: signals, pipes and terminals."""

import os
import pty
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.inkwell.fake_server import TIMEOUT_S, InkwellServer

COMMAND = [sys.executable, "-m", "inkwell"]
ROOT = Path(__file__).resolve().parents[3]


def environment(server: InkwellServer, **more: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "FORCE_COLOR", "COLORTERM")}
    return kept | {"INKWELL_ADDRESS": server.address, "PYTHONPATH": str(ROOT), "COLUMNS": "100"} | more


def files(folder: Path, *contents: str) -> list[str]:
    names = [f"{number}.png" for number, _ in enumerate(contents)]
    for name, content in zip(names, contents, strict=True):
        (folder / name).write_bytes(content.encode())
    return names


class Terminal:
    """The command with stderr, and stdout unless told otherwise, on a pseudo-terminal."""

    def __init__(self, arguments: list[str], folder: Path, env: dict[str, str], *, stdout_too: bool = True) -> None:
        controller, terminal = pty.openpty()
        self._seen = bytearray()
        self._grown = threading.Condition()
        self.process = subprocess.Popen(
            [*COMMAND, *arguments],
            cwd=folder,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=terminal if stdout_too else subprocess.PIPE,
            stderr=terminal,
        )
        os.close(terminal)
        self._reader = threading.Thread(target=self._read, args=(controller,))
        self._reader.start()

    def _read(self, controller: int) -> None:
        while True:
            try:
                chunk = os.read(controller, 65536)
            except OSError:  # how Linux says that the other end is closed
                chunk = b""
            if not chunk:
                os.close(controller)
                return
            with self._grown:
                self._seen += chunk
                self._grown.notify_all()

    @property
    def text(self) -> str:
        with self._grown:
            return self._seen.decode(errors="replace")

    def wait_for(self, shown: str) -> None:
        with self._grown:
            assert self._grown.wait_for(lambda: shown.encode() in self._seen, TIMEOUT_S), self._seen

    def end(self) -> int:
        code = self.process.wait(TIMEOUT_S)
        self._reader.join(TIMEOUT_S)
        return code


@pytest.mark.parametrize(
    "arguments",
    [
        lambda folder: ["read", *files(folder, "hold")],
        lambda folder: ["read", *files(folder, "say a", "hold")],
        lambda folder: ["paint", "hold", "-o", "cat.png"],
        lambda folder: ["document", *files(folder, "hold\fb")],
        lambda folder: ["models", "load", "hold", "--service", "ocr"],
    ],
    ids=["read one", "read many", "paint", "document", "models load"],
)
def test_ctrl_c_cancels_the_call_at_the_server_and_ends_in_130(
    server: InkwellServer, tmp_path: Path, arguments: Callable[[Path], list[str]]
) -> None:
    process = subprocess.Popen(
        [*COMMAND, *arguments(tmp_path)],
        cwd=tmp_path,
        env=environment(server),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert server.held.wait(TIMEOUT_S)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert server.cancelled.wait(TIMEOUT_S)
    assert not (tmp_path / "cat.png").exists()


def test_a_reader_that_stops_ends_the_command_quietly(server: InkwellServer, tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    process = subprocess.Popen(
        [*COMMAND, "read", *files(tmp_path, "say a", "hold")],
        cwd=tmp_path,
        env=environment(server),
        stdout=writing,
        stderr=subprocess.PIPE,
    )
    os.close(writing)
    _, err = process.communicate(timeout=TIMEOUT_S)
    assert (process.returncode, err) == (141, b"")
    assert server.held.is_set() <= server.cancelled.wait(TIMEOUT_S)


def test_a_terminal_without_unicode_gets_escapes(server: InkwellServer, tmp_path: Path) -> None:
    env = environment(server, PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    done = subprocess.run(
        [*COMMAND, "read", *files(tmp_path, "say Käse")], cwd=tmp_path, env=env, capture_output=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, b"K\\xe4se\n")


def test_text_grows_on_a_terminal_and_the_result_stays(server: InkwellServer, tmp_path: Path) -> None:
    env = environment(server, TERM="xterm-256color")
    terminal = Terminal(["read", *files(tmp_path, "hold")], tmp_path, env)
    terminal.wait_for("hold▌")
    server.release.set()
    assert terminal.end() == 0
    assert terminal.text.rstrip().endswith("hold")


def test_progress_stays_out_of_a_piped_stdout(server: InkwellServer, tmp_path: Path) -> None:
    env = environment(server, TERM="xterm-256color", COLORTERM="truecolor")
    (document := tmp_path / "letter.pdf").write_bytes(b"x\fy")
    for arguments, result in (
        (["read", *files(tmp_path, "say a", "say b")], b"0.png\ta\n1.png\tb\n"),
        (["paint", "a cat", "-o", "cat.png"], b"cat.png\n"),
        (["document", document.name], b"x\n\fy\n"),
    ):
        terminal = Terminal(arguments, tmp_path, env, stdout_too=False)
        assert terminal.process.stdout is not None
        assert terminal.process.stdout.read() == result
        terminal.process.stdout.close()
        assert terminal.end() == 0
        assert "\x1b[" in terminal.text


def test_a_terminal_shows_steps_and_draws_previews(server: InkwellServer, tmp_path: Path) -> None:
    env = environment(server, TERM="xterm-256color", COLORTERM="truecolor")
    terminal = Terminal(["paint", "hold", "-o", "cat.png", "--seed", "5"], tmp_path, env)
    terminal.wait_for("2/20 steps")
    terminal.wait_for("s left")
    server.release.set()
    assert terminal.end() == 0
    assert "▀" in terminal.text
    assert "\x1b[38;2;" in terminal.text
    assert terminal.text.rstrip().endswith("cat.png")
    assert not server.requests[0].preview.disabled


def test_a_terminal_shows_how_far_a_document_is(server: InkwellServer, tmp_path: Path) -> None:
    env = environment(server, TERM="xterm-256color")
    terminal = Terminal(["document", *files(tmp_path, "hold\nb\fc\nd")], tmp_path, env)
    terminal.wait_for("2/4 lines")
    terminal.wait_for("page 1/2")
    terminal.wait_for("2.0 s left")
    terminal.wait_for("hold")  # a page is printed as soon as it is read
    server.release.set()
    assert terminal.end() == 0
    assert "hold\r\nb\r\n" in terminal.text
    assert "\r\nc\r\nd\r\n" in terminal.text
    assert "4/4 lines" in terminal.text


def test_a_terminal_shows_how_a_model_loads(server: InkwellServer, tmp_path: Path) -> None:
    arguments = ["models", "load", "hold", "--service", "diffusion"]
    terminal = Terminal(arguments, tmp_path, environment(server, TERM="xterm-256color"))
    terminal.wait_for("reading weights")
    server.release.set()
    assert terminal.end() == 0
    assert "hold is ready" in terminal.text


@pytest.mark.parametrize(
    ("arguments", "more"),
    [
        (["--no-preview"], {"TERM": "xterm-256color", "COLORTERM": "truecolor"}),
        ([], {"TERM": "xterm-256color", "COLORTERM": "truecolor", "NO_COLOR": "1"}),
        ([], {"TERM": "dumb"}),
        (["--quiet"], {"TERM": "xterm-256color", "COLORTERM": "truecolor"}),
    ],
    ids=["not wanted", "no colour", "dumb", "quiet"],
)
def test_no_previews_are_asked_for_where_none_are_drawn(
    server: InkwellServer, tmp_path: Path, arguments: list[str], more: dict[str, str]
) -> None:
    terminal = Terminal(["paint", "a cat", "-o", "cat.png", *arguments], tmp_path, environment(server, **more))
    assert terminal.end() == 0
    assert "▀" not in terminal.text
    assert server.requests[0].preview.disabled


def test_lists_are_tables_on_a_terminal(server: InkwellServer, tmp_path: Path) -> None:
    terminal = Terminal(["fleet"], tmp_path, environment(server, TERM="xterm-256color"))
    assert terminal.end() == 0
    assert "10.0.0.2:50051" in terminal.text
    assert "\t" not in terminal.text


def test_a_narrow_terminal_loses_nothing_of_a_table(server: InkwellServer, tmp_path: Path) -> None:
    terminal = Terminal(["models"], tmp_path, environment(server, TERM="dumb"))  # which is 80 characters wide
    assert terminal.end() == 0
    assert max(map(len, terminal.text.splitlines())) <= 80
    letters = "".join(terminal.text.split())
    assert all(part in letters for part in ("pen", "tokens", "euler")), terminal.text


PROGRAMS = {
    "read": "client.read(b'hold')",
    "read_stream": "list(client.read_stream(b'hold'))",
    "read_many": "list(client.read_many([b'say a', b'hold']))",
    "paint": "client.paint('hold')",
    "read_document": "client.read_document(b'hold')",
}


@pytest.mark.parametrize("call", PROGRAMS.values(), ids=PROGRAMS)
def test_ctrl_c_in_a_program_of_ones_own_cancels_the_call_too(server: InkwellServer, call: str) -> None:
    program = f"import inkwell\nwith inkwell.Client({server.address!r}) as client:\n    {call}"
    process = subprocess.Popen([sys.executable, "-c", program], env=environment(server), stderr=subprocess.PIPE)
    assert server.held.wait(TIMEOUT_S)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=TIMEOUT_S)
    assert err.rstrip().endswith(b"KeyboardInterrupt")
    assert server.cancelled.wait(TIMEOUT_S)
