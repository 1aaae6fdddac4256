"""Measures accuracy and latency of ONNX files on their runtime. Runs on boards; needs only numpy and a runtime."""
