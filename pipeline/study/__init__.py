"""`crqat study`: compares training methods on one recipe, over several seeds, with the necessary controls."""
