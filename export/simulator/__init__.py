"""An ONNX file's integer codes in numpy."""
