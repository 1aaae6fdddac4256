"""The gate stage: judges a benchmark's results against limits."""
