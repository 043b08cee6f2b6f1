"""The engine process: `python -m services.kit.engine_worker FACTORY FD`, started by the engine host.

Settings arrive as JSON on standard input. One thread reads commands, one sends heartbeats, and the main thread
alternates between handling commands and letting the engine do one step. When the front goes away, so does this.
"""

import importlib
import os
import queue
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable

from services.kit import phases, wire
from services.kit.engine_api import (
    END_S,
    Accepted,
    BackgroundEngine,
    Cancel,
    Cancelled,
    Command,
    Engine,
    Event,
    Failed,
    Finished,
    Heartbeat,
    Ready,
    Submit,
    Traced,
    call_endings,
)
from services.kit.faults import Fault

_HEARTBEAT_S = 1.0


def main() -> None:
    factory_name, fd = sys.argv[1], int(sys.argv[2])
    # Ctrl-C reaches the whole process group; the front decides when the engine ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection = socket.socket(fileno=fd)
    settings_json = sys.stdin.read()
    module_name, _, function_name = factory_name.partition(":")
    factory: Callable[[str], Engine] = getattr(importlib.import_module(module_name), function_name)
    _Worker(connection).run(lambda: factory(settings_json))


class _Worker:
    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        # None only wakes: the engine has something to do that no command told of.
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._send_lock = threading.Lock()
        self._step_began: float | None = None
        self._ending = threading.Lock()

    def run(self, create: Callable[[], Engine]) -> None:
        threading.Thread(target=self._read_commands, name="commands", daemon=True).start()
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()
        engine = create()
        if isinstance(engine, BackgroundEngine):
            engine.on_wake(lambda: self._commands.put(None))
        self._send(Ready(wire.raw(engine.info())))
        while True:
            self._handle_commands(engine)
            self._step_began = time.monotonic()
            events = engine.step()
            self._step_began = None
            for event in events:
                self._tell(event)

    def _handle_commands(self, engine: Engine) -> None:
        # Sleep only when the engine has nothing to do; otherwise take what is there and go on.
        wait = not engine.busy
        while True:
            try:
                command = self._commands.get(block=wait)
            except queue.Empty:
                return
            match command:
                case Submit(job, payload, traced):
                    if traced:
                        phases.follow(job)
                    try:
                        engine.submit(job, payload)
                    except Fault as fault:
                        self._tell(Failed(job, fault.data))
                case Cancel(job):
                    engine.cancel(job)
            wait = False

    def _tell(self, event: Event) -> None:
        """Send what came of a job, and before its last event what it went through."""
        match event:
            case Accepted(job):
                phases.accepted(job)
            case Finished(job) | Failed(job) | Cancelled(job):
                if went_through := phases.take(job):
                    self._send(Traced(job, went_through))
        self._send(event)

    def _send(self, event: Event) -> None:
        frame = wire.encode(event)
        with self._send_lock:
            try:
                self._connection.sendall(frame)
            except OSError:
                self._end()  # the front is gone

    def _read_commands(self) -> None:
        while (command := wire.read_command(self._connection)) is not None:
            self._commands.put(command)
        # The front closed the connection or died: nobody waits for what is being computed.
        self._end()

    def _end(self) -> None:
        # The first thread that comes here ends the process; others wait for that.
        with self._ending:
            late = threading.Timer(END_S, os._exit, (0,))
            late.daemon = True
            late.start()
            try:
                call_endings()
            except Exception:  # noqa: BLE001 - it has to end, whatever was left behind
                traceback.print_exc()
            os._exit(0)

    def _beat(self) -> None:
        while True:
            began = self._step_began
            self._send(Heartbeat(0.0 if began is None else time.monotonic() - began))
            time.sleep(_HEARTBEAT_S)


if __name__ == "__main__":
    try:
        main()
    except BaseException:  # noqa: BLE001 - whatever it was, this process must end, and say why
        traceback.print_exc()
        sys.stderr.flush()
        # Not sys.exit: threads and native libraries must not keep a broken engine alive.
        os._exit(1)
