"""Running a compiled graph: one interface, a module a runtime (onnxruntime, openvino, tensorrt, triton)."""
