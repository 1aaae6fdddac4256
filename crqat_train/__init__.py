"""Trains quantized networks from images, and writes them as checkpoints. Needs torch."""
