"""A float vision network goes in, an INT8 model that is verified on its edge runtime comes out."""

from __future__ import annotations


def __getattr__(name: str) -> str:
    if name == "__version__":
        from importlib import metadata

        return metadata.version("crqat-edge")
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)
