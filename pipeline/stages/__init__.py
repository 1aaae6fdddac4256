"""Runs stages, and skips those that are up to date."""
