"""Runs a graph on a Triton server, by NVIDIA's own client.

Every call sends its inputs and fetches its outputs over gRPC; on the server's own host they may go through shared
memory instead (`SessionOptions.triton_shared_memory`).
"""

import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import msgspec
import numpy as np
import torch
from torch import Tensor
from tritonclient.grpc import InferenceServerClient, InferInput, InferRequestedOutput
from tritonclient.utils import InferenceServerException

from services.runtimes.artifacts.manifest import Port, RuntimeName
from services.runtimes.sessions.checked import require_fit, torch_dtype
from services.runtimes.sessions.interface import SessionError, SessionOptions
from services.runtimes.sessions.triton_memory import Region, byte_size
from services.runtimes.sessions.triton_ports import (
    IDENTITY_PARAMETER,
    PORTS_PARAMETER,
    Ports,
    port_dtype,
    triton_dtype,
)

# For the questions that take no computing; a server that is up answers them in milliseconds.
_ASK_SECONDS = 10.0
# How long a server that is away, such as one that is started anew, is asked again.
_AWAY_SECONDS = 10.0
_FIRST_PAUSE_SECONDS = 0.1
_LONGEST_PAUSE_SECONDS = 1.0
_CHANNEL_OPTIONS = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # By default gRPC waits a second and more before it connects again, and fails calls until then.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
]
# Protobuf's own limit of a message is 2^31 - 1 bytes; names and shapes take a little of it.
_MOST_BYTES = 2**31 - 1 - 2**20
_SECURE = "grpcs://"


class TritonSession:
    """See `interface.Session`. The model's name is that of the folder that the file's version folder lies in."""

    runtime: RuntimeName = "triton"

    def __init__(self, file: Path, options: SessionOptions) -> None:
        """Find the model on the server. file: the graph within the repository, MODEL/1/model.onnx.

        Raises SessionError if the server or the model is not there or not ready, or if it serves another build.
        """
        if not options.triton_address:
            raise SessionError(
                f"{file}: the triton runtime takes the address of a Triton server, host:port of its gRPC"
            )
        self._model, self._version = file.parent.parent.name, file.parent.name
        self._address = options.triton_address
        self._timeout = options.triton_timeout_s
        secure = self._address.startswith(_SECURE)
        self._client = InferenceServerClient(
            self._address.removeprefix(_SECURE), ssl=secure, channel_args=_CHANNEL_OPTIONS
        )
        try:
            self._require_ready()
            config = self._ask(self._client.get_model_config).config
            self._require_same_build(file, config)
            self._wire = self._wire_ranks()
            ports = self._ports(config)
            self.inputs, self.outputs, self._axes = ports.inputs, ports.outputs, ports.axes
            self._shared: tuple[Region, Region] | None = None
            if options.triton_shared_memory:
                self._shared = (Region(self._client, _ASK_SECONDS), Region(self._client, _ASK_SECONDS))
        except BaseException:
            self._client.close()
            raise

    def run(self, feeds: Mapping[str, Tensor], wanted: Sequence[str] | None = None) -> dict[str, Tensor]:
        """See `interface.Session.run`. A server that is away is asked again; any other failure raises at once."""
        require_fit(Path(self._model), self.inputs, feeds)
        tensors = {port.name: feeds[port.name].detach().cpu().contiguous() for port in self.inputs}
        ports = [port for port in self.outputs if wanted is None or port.name in wanted]
        if self._shared is None:
            total = sum(tensor.nbytes for tensor in tensors.values())
            if total > _MOST_BYTES:
                raise SessionError(
                    f"{self._where()}: the inputs take {total} bytes, and one gRPC message holds {_MOST_BYTES}; send"
                    " fewer rows, or use shared memory with a server on this host"
                )
            inputs = [self._plain_input(port, tensors[port.name]) for port in self.inputs]
            response = self._infer(inputs, [InferRequestedOutput(port.name) for port in ports])
            return self._received(response, {})
        return self._run_shared(self._shared, tensors, ports)

    def close(self) -> None:
        """See `interface.Session.close`."""
        for region in self._shared or ():
            region.close()
        self._client.close()
        # Its finalizer closes it once more, and fails once the interpreter is being torn down.
        self._shared = None
        del self._client

    def _where(self) -> str:
        return f"Triton at {self._address}, model {self._model}"

    def _ask(self, question: Any) -> Any:
        try:
            return question(self._model, self._version, client_timeout=_ASK_SECONDS)
        except InferenceServerException as error:
            raise SessionError(f"{self._where()}: {_told(error)}") from error

    def _require_ready(self) -> None:
        try:
            if not self._client.is_server_ready(client_timeout=_ASK_SECONDS):
                raise SessionError(
                    f"Triton at {self._address} is up and not ready: it still loads models, or one failed"
                )
            if self._client.is_model_ready(self._model, self._version, client_timeout=_ASK_SECONDS):
                return
            index = self._client.get_model_repository_index(client_timeout=_ASK_SECONDS).models
        except InferenceServerException as error:
            raise SessionError(f"Triton at {self._address} cannot be asked: {_told(error)}") from error
        states = {model.name: f"{model.state} {model.reason}".strip() for model in index}
        if self._model in states:
            raise SessionError(
                f"{self._where()}: version {self._version} is not ready: {states[self._model] or 'not loaded'}"
            )
        there = ", ".join(sorted(states)) or "none"
        raise SessionError(
            f"{self._where()}: the server has no such model; it has {there}. Start it with --model-repository on the"
            " artifact's repository folder"
        )

    def _require_same_build(self, file: Path, config: Any) -> None:
        """The server may serve a model of this name that another compile made."""
        here = file.parent.parent / "config.pbtxt"
        try:
            match = re.search(rf'"{IDENTITY_PARAMETER}"\s*value\s*{{\s*string_value:\s*"([0-9a-f]+)"', here.read_text())
        except OSError as error:
            raise SessionError(
                f"{here}: cannot be read, so that the server's model cannot be known: {error}"
            ) from error
        mine, its = match and match[1], config.parameters[IDENTITY_PARAMETER].string_value
        if mine and mine != its:
            raise SessionError(
                f"{self._where()}: it serves another build (sha-256 {its[:12] or 'not told'}) than this artifact's"
                f" ({mine[:12]}); point its --model-repository to this artifact, or use the one that it serves"
            )

    def _wire_ranks(self) -> dict[str, int]:
        """How many dimensions tensors have on the wire: Triton has no scalars, and takes one element for them."""
        metadata = self._ask(self._client.get_model_metadata)
        return {tensor.name: len(tensor.shape) for tensor in (*metadata.inputs, *metadata.outputs)}

    def _ports(self, config: Any) -> Ports:
        told = config.parameters[PORTS_PARAMETER].string_value
        if told:
            return msgspec.json.decode(told, type=Ports)
        # A repository that is not of the compiler's making.
        metadata = self._ask(self._client.get_model_metadata)
        return Ports(
            tuple(self._port(tensor) for tensor in metadata.inputs),
            tuple(self._port(tensor) for tensor in metadata.outputs),
            (),
        )

    def _port(self, tensor: Any) -> Port:
        dtype = port_dtype(tensor.datatype)
        if dtype is None:
            raise SessionError(f"{self._where()}: {tensor.name} is {tensor.datatype}, which torch tensors do not hold")
        sizes = (size if size >= 0 else f"{tensor.name}.{place}" for place, size in enumerate(tensor.shape))
        return Port(tensor.name, dtype, tuple(sizes))

    def _input(self, port: Port, tensor: Tensor) -> InferInput:
        shape = list(tensor.shape)
        if self._wire.get(port.name) == len(shape) + 1:
            shape.append(1)
        return InferInput(port.name, shape, triton_dtype(port.dtype))

    def _plain_input(self, port: Port, tensor: Tensor) -> InferInput:
        entry = self._input(port, tensor)
        array = (
            tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if port.dtype == "bfloat16" else tensor.numpy()
        )
        entry.set_data_from_numpy(array.reshape(entry.shape()))
        return entry

    def _run_shared(
        self, shared: tuple[Region, Region], tensors: Mapping[str, Tensor], ports: Sequence[Port]
    ) -> dict[str, Tensor]:
        there, back = shared
        offsets = there.write(list(tensors.values()))
        sizes: dict[str, int] = {}
        axes = self._sizes(tensors)
        for port in ports:
            if (size := byte_size(port, axes)) is not None:
                sizes[port.name] = size
        back_offsets = dict(zip(sizes, back.reserve(list(sizes.values())), strict=True))

        def inputs() -> list[InferInput]:
            entries = []
            for port, offset in zip(self.inputs, offsets, strict=True):
                tensor = tensors[port.name]
                if tensor.nbytes:
                    entry = self._input(port, tensor)
                    entry.set_shared_memory(there.name, tensor.nbytes, offset)
                else:
                    entry = self._plain_input(port, tensor)
                entries.append(entry)
            return entries

        def outputs() -> list[InferRequestedOutput]:
            entries = []
            for port in ports:
                entry = InferRequestedOutput(port.name)
                if sizes.get(port.name):
                    entry.set_shared_memory(back.name, sizes[port.name], back_offsets[port.name])
                entries.append(entry)
            return entries

        try:
            response = self._infer(inputs(), outputs())
        except SessionError as error:
            # A server that was started anew has forgotten its regions.
            if "shared memory region" not in str(error):
                raise
            there.register()
            back.register()
            response = self._infer(inputs(), outputs())
        return self._received(response, {name: (back, back_offsets[name]) for name, size in sizes.items() if size})

    def _sizes(self, tensors: Mapping[str, Tensor]) -> dict[str, int]:
        """The sizes of the axes that these inputs give."""
        return {
            name: size
            for port in self.inputs
            for name, size in zip(port.shape, tensors[port.name].shape, strict=True)
            if isinstance(name, str)
        }

    def _infer(self, inputs: list[InferInput], outputs: list[InferRequestedOutput]) -> Any:
        """One inference. It has no side effects, so that asking again is safe as long as no answer came."""
        start = time.monotonic()
        pause = _FIRST_PAUSE_SECONDS
        while True:
            left = self._timeout - (time.monotonic() - start)
            try:
                result = self._client.infer(
                    self._model, inputs, self._version, outputs, client_timeout=max(0.001, left)
                )
                return result.get_response()
            except InferenceServerException as error:
                spent = time.monotonic() - start
                away = error.status() == "StatusCode.UNAVAILABLE"
                if not away or spent + pause > min(_AWAY_SECONDS, self._timeout):
                    raise SessionError(f"{self._where()}: {_told(error, self._timeout)}") from error
            time.sleep(pause)
            pause = min(pause * 2, _LONGEST_PAUSE_SECONDS)

    def _received(self, response: Any, shared: Mapping[str, tuple[Region, int]]) -> dict[str, Tensor]:
        ports = {port.name: port for port in self.outputs}
        tensors = {}
        # One entry an output, empty for those in shared memory.
        for output, content in zip(response.outputs, response.raw_output_contents, strict=True):
            port = ports[output.name]
            shape = tuple(output.shape)
            if len(shape) == len(port.shape) + 1:
                shape = shape[:-1]
            dtype = torch_dtype(port.dtype)
            if output.name in shared:
                region, offset = shared[output.name]
                tensors[output.name] = region.read(offset, shape, dtype)
            elif not content:
                tensors[output.name] = torch.empty(shape, dtype=dtype)
            else:
                # The bytes are the message's; the tensor is the caller's own, and writable.
                raw = np.frombuffer(content, dtype=np.uint8).copy()
                tensors[output.name] = torch.from_numpy(raw).view(dtype).view(shape)
        return tensors


def _told(error: InferenceServerException, timeout_s: float = _ASK_SECONDS) -> str:
    """What went wrong and what would help."""
    status = str(error.status() or "").removeprefix("StatusCode.")
    helps = {
        "UNAVAILABLE": "it cannot be reached; is it running, and is this the port of its gRPC (8001 by default)?",
        "DEADLINE_EXCEEDED": f"no answer within {timeout_s:g} seconds; raise the timeout or send fewer rows",
        "UNIMPLEMENTED": "this server does not speak Triton's protocol",
    }.get(status, "")
    return ": ".join(part for part in (status, helps, error.message()) if part)
