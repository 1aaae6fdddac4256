"""Reads, checks and writes recipes."""
