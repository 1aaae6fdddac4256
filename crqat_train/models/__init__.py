"""Builds float networks by name and loads their weights."""
