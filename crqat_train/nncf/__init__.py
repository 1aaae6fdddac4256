"""Imports and exports NNCF checkpoints."""
