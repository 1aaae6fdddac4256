"""What a stage leaves behind, as dataclasses; `crqat.core.typed_json` reads and writes them.

What a reader relies on must be there. What is evidence alone has a default, so that files of earlier versions, which
did not record it, still read.
"""
