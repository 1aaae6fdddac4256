"""The user side: command line, recipes, stages, gate."""
