"""Loads images from their source, splits, augments and batches them."""
