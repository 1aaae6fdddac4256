"""Measures accuracy and latency of a file on its runtime. Runs on boards; needs only numpy and a runtime."""
