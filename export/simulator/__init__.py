"""Simulates the integer codes of an ONNX file in numpy."""
