"""The recipe: reading and checking it."""
