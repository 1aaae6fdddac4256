"""Benchmarks on another machine (board)."""
