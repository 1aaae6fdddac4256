"""Writes ONNX graphs with QuantizeLinear and DequantizeLinear, and checks them against the targets' rules."""
