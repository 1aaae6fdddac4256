"""Analyses the cost of bit widths, and finds the part of a network that fails."""
