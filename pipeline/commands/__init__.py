"""The commands beside the four stages."""
