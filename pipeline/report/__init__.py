"""Shows results as tables and as an HTML page."""
