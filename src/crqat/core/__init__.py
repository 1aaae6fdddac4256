"""The contract between the stages: errors, integer Grids, run directories. Standard library and numpy only."""
