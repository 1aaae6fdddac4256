"""Decides which edges are quantized, with which codes and bit widths."""
