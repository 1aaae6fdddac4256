"""What runs on the board: accuracy and latency of a file on its runtime. Needs numpy and a runtime only."""
