"""torch's operators as operations of ONNX, opset 17: a closed list, a file for each kind."""

from crqat.export.graph.operators import activations, arithmetic, layers, movement
from crqat.export.graph.operators.walk import Walk

__all__ = ["Walk", "activations", "arithmetic", "layers", "movement"]
