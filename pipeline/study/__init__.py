"""`crqat study`: several trainings of one recipe side by side, over seeds, with the controls that a gain needs."""
