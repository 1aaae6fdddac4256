"""Converts torch networks to float ONNX graphs."""
