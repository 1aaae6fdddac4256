"""What a bit width costs, and which part of a network fails."""
