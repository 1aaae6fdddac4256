"""What the stages share: errors, integer Grids, run directories. Needs only the standard library and numpy."""
