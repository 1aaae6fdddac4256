"""Checkpoint in, ONNX files with Q/DQ nodes out, one or more for each target. Needs torch and onnx."""
