"""Whether training, simulator and runtime agree."""

# `fusion.fusion`'s reason where it knows none.
UNEXPLAINED = "ONNX Runtime did not fuse it"
