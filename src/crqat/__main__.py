"""`python -m crqat` is the command line."""

import os
import sys

if __name__ == "__main__":
    # `python -m` searches the current folder first, where a user's onnx/ or datasets.py would take the place of a
    # library. It comes last instead, as for the installed command; one that PYTHONPATH names stays where it is.
    if not getattr(sys.flags, "safe_path", False) and sys.path[0] == os.getcwd():  # noqa: PTH109 (loads less)
        sys.path.append(sys.path.pop(0))
    from crqat.pipeline.cli import main

    main()
