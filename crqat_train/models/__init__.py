"""Float networks by name, and their weights."""
