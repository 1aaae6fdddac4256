"""A TensorRT timing cache that several builds share: locked, merged, hashed and replaced atomically.

With the measured times of earlier builds, a build is faster and chooses the same kernels again. The file is one line
with the SHA-256 of the rest, followed by TensorRT's own bytes. A cache can always be measured again: a file that is
damaged or belongs to another TensorRT or device is not used, and the next build replaces it.
"""

from __future__ import annotations

import fcntl
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from crqat.core.errors import ToolError
from crqat.core.run_directory import replace_file

if TYPE_CHECKING:
    import tensorrt as trt


def attach(config: trt.IBuilderConfig, path: Path) -> trt.ITimingCache:
    """Make a build use the timing cache in the file `path`, or an empty cache if the file is missing or unusable.

    Returns:
        The cache, which must stay alive as long as the build.

    Raises:
        ToolError: TensorRT rejects even a new cache, or the file cannot be locked.
    """
    with _locked(path):
        content = _read(path)
    for blob in (content, b""):
        cache = config.create_timing_cache(blob) if blob is not None else None
        # A mismatch is not ignored: times of another device would select the wrong kernels.
        if cache is not None and config.set_timing_cache(cache, ignore_mismatch=False):
            return cache
    msg = f"{path}: this TensorRT rejects every timing cache, even a new one; build without a timing cache"
    raise ToolError(msg)


def merge(config: trt.IBuilderConfig, cache: trt.ITimingCache, path: Path) -> str:
    """Add the kernel times that a build measured to the cache file, and keep those that parallel builds added.

    Args:
        config: Configuration of the build that has ended.
        cache: Cache that `attach` returned for the build.
        path: File of the cache.

    Returns:
        SHA-256 of TensorRT's bytes in the file, for the record of the build.

    Raises:
        ToolError: The cache cannot be serialized, or the file cannot be written.
    """
    with _locked(path):
        content = _read(path)
        other = config.create_timing_cache(content) if content is not None else None
        if other is not None:
            # False for a cache of another TensorRT or device, which is then replaced.
            cache.combine(other, ignore_mismatch=False)
        serialized = cache.serialize()
        if serialized is None:
            msg = f"{path}: TensorRT does not serialize its timing cache; build without a timing cache"
            raise ToolError(msg)
        blob = bytes(serialized)
        digest = hashlib.sha256(blob).hexdigest()
        try:
            replace_file(path, digest.encode() + b"\n" + blob)
        except OSError as error:
            msg = f"{path}: cannot be written: {error.strerror}"
            raise ToolError(msg) from error
    return digest


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of a cache. The lock is a separate file, because the cache itself is replaced."""
    try:
        file = path.with_name(f"{path.name}.lock").open("a")
    except OSError as error:
        msg = f"{path}: cannot be locked: {error.strerror}"
        raise ToolError(msg) from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _read(path: Path) -> bytes | None:
    """Return TensorRT's bytes in a cache file; None if the file is missing or its hash does not match."""
    try:
        digest, _, blob = path.read_bytes().partition(b"\n")
    except OSError:
        return None
    return blob if hashlib.sha256(blob).hexdigest().encode() == digest else None
