"""Running stages, and not running those that are up to date."""
