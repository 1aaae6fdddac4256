"""Code that all stages share: errors, Grids, run directories. Needs only the standard library and numpy."""
