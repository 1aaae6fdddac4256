"""Whether training, simulator and runtime agree."""
