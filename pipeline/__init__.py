"""The user interface: command line, recipes, stages and gate."""
