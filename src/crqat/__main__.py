"""`python -m crqat` is the command line."""

from crqat.pipeline.cli import main

if __name__ == "__main__":
    main()
