"""Implementations of the commands that do more than run one stage, such as `advise`, `init` and `compare`."""
