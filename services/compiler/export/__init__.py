"""From a checkpoint to float32 ONNX graphs: one module a kind of model, and what they share."""
