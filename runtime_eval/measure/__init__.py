"""Accuracy, latency and codes of one model, in a process of its own."""
