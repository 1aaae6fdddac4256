"""Builds, reads and stores TensorRT engines."""
