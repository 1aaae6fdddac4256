"""Measures what low bit widths cost in accuracy, and finds the smallest part of a file that a builder refuses."""
