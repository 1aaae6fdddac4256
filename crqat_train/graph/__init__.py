"""Traces networks to torch.fx graphs and analyses them."""
