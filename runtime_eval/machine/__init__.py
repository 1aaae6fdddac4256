"""Describes the machine that measures."""
