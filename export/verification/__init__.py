"""Verifies that training, simulator and runtime compute the same codes."""

# Reason of `fusion.fusion` if the cause is unknown.
UNEXPLAINED = "ONNX Runtime did not fuse it"
