"""Whether training, simulator and runtime agree."""

# `links.fusion`'s reason where it knows none.
UNEXPLAINED = "ONNX Runtime did not fuse it"
