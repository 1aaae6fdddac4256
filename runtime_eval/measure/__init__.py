"""Measures accuracy, latency and codes of one model in its own process."""
