"""Which edges carry quantizers, and of which range."""
