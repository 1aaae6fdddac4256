"""The commands besides the four stages."""
