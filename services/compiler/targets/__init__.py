"""What graphs are compiled to where that takes more than writing ONNX or OpenVINO files."""
