"""Checkpoints to and from stock NNCF."""
