"""From torch to a float ONNX graph."""
