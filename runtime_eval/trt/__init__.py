"""TensorRT engines: building, reading, keeping."""
