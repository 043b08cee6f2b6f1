"""Triton's backend `onnxruntime` as a Python-based backend, for a tritonserver that comes with none.

Runs within NVIDIA's tritonserver, on the interpreter that it was installed with: nothing of Inkwell is importable here.
"""

import json
import os
from typing import Any

import onnxruntime
import triton_python_backend_utils as pb_utils  # type: ignore[import-not-found] # it exists within tritonserver only


class TritonPythonModel:
    """One instance of any model whose configuration says backend: "onnxruntime"."""

    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        folder = os.path.join(args["model_repository"], args["model_version"])
        options = onnxruntime.SessionOptions()
        threads = config.get("parameters", {}).get("intra_op_thread_count", {}).get("string_value")
        if threads:
            options.intra_op_num_threads = int(threads)
        self._session = onnxruntime.InferenceSession(
            os.path.join(folder, config["default_model_filename"]), options, providers=["CPUExecutionProvider"]
        )
        self._inputs = [entry.name for entry in self._session.get_inputs()]

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        feeds = {name: pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in self._inputs}
        try:
            results = self._session.run(request.requested_output_names(), feeds)
        except Exception as error:  # noqa: BLE001 - it belongs to this request alone
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error)))
        tensors = [
            pb_utils.Tensor(name, result)
            for name, result in zip(request.requested_output_names(), results, strict=True)
        ]
        return pb_utils.InferenceResponse(output_tensors=tensors)
