"""Entry point of `python3 -m runtime_eval .` in an unpacked bundle, which holds this file as its `__main__.py`."""

import sys

from crqat.runtime_eval.__main__ import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
