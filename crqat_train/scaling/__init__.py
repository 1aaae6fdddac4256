"""How fast a training would be in several processes."""
