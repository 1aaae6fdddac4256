"""Conversion of torch operators to ONNX, opset 17: a closed list, with one file for each kind."""

from crqat.export.graph.operators import activations, arithmetic, layers, movement
from crqat.export.graph.operators.walk import Walk

__all__ = ["Walk", "activations", "arithmetic", "layers", "movement"]
