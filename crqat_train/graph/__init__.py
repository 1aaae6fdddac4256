"""The network as a torch.fx graph."""
