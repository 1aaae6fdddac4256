"""Reports unexpected exceptions in one line: the cause, where it was raised and where the traceback was written."""

from __future__ import annotations

import errno
import os
import platform
import signal
import sys
import sysconfig
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path

from crqat.core.errors import CrqatError, InternalError, Told, ToolError, UsageError

TRACEBACK = "traceback.txt"
# Operating system errors about a place, permissions or a limit; no change of recipe or code fixes them.
_PLACE = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO, errno.EACCES, errno.EPERM),
    *(errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ENOTCONN, errno.ENODEV, errno.ENXIO),
)
# Libraries wrap these words in exceptions of their own.
_FULL = tuple(os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS))
_NO_MEMORY = ("can't allocate memory", "out of memory", "Cannot allocate memory")
# In a checkout, most of crqat's parts are links, so a traceback may name a file by either of two paths.
_PARTS = {part.name: part.resolve() for part in Path(__file__).parents[1].iterdir() if part.is_dir()}
_LIBRARIES = tuple(
    {os.path.realpath(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
)
_DISTRIBUTIONS = (
    "crqat-edge",
    "torch",
    "torchvision",
    "timm",
    "nncf",
    "onnx",
    "onnxruntime",
    "numpy",
    "tensorrt-rtx-cu13",
)


@contextmanager
def explained(what: str, run: Path | None = None) -> Iterator[None]:
    """Context manager that converts exceptions in its body to a `CrqatError`, except those that already are one.

    A broken pipe passes through as well: only the code that prints knows whether it is the pipe of the output.

    Args:
        what: Name of the stage or command, for the message.
        run: Directory of the run, where the traceback is written; None for a temporary directory.

    Raises:
        CrqatError: The converted exception; see `explain`.
    """
    try:
        yield
    except (CrqatError, Told, BrokenPipeError):
        raise
    except (Exception, SystemExit) as error:
        raise explain(error, what, run) from error


def explain(error: BaseException, what: str, run: Path | None = None) -> CrqatError:
    """Convert an unexpected exception to an error of one line.

    Args:
        error: The exception. A full disk, lack of memory and the like are errors of the environment, wherever they were
            raised. For all others, the innermost line outside libraries decides whether crqat or the user's code is at
            fault.
        what: Name of the stage or command.
        run: Directory of the run; None if there is none yet.

    Returns:
        ToolError: The environment is at fault; no traceback is written.
        UsageError: The user's code raised the exception or ended the process; the message names file and line.
        InternalError: crqat is at fault; the message names the traceback's file and how to report it.
    """
    environment = _of_environment(error)
    if environment is not None:
        return ToolError(f"{what}: {environment}")
    place, users = _place(error)
    kind = "sys.exit" if isinstance(error, SystemExit) else type(error).__name__
    text = f"sys.exit({error.code!r})" if isinstance(error, SystemExit) else f"{kind}: {error}".rstrip(": ")
    text = _short(text)
    at = f" at {place}" if place else ""
    written = _write(error, run)
    if users and isinstance(error, SystemExit):
        return UsageError(f"{what}: your code ended the process{at} by {text}; let it return or raise; {written}")
    if users:
        return UsageError(f"{what}: your code raised {text}{at}; {written}")
    if _of_compiler(error):
        return ToolError(f"{what}: torch.compile failed ({text}); set `compile: never` in the recipe; {written}")
    return InternalError(
        f"internal error in {what}: {text}{at}; {written}; report it with that file under the repository's Issues"
    )


def tell(error: Exception, program: str) -> int:
    """Print the error that ends a program as one line on standard error and return its exit code."""
    told = error if isinstance(error, CrqatError) else explain(error, program)
    with suppress(OSError):
        print(f"{program}: {told}" if isinstance(error, CrqatError) else told, file=sys.stderr, flush=True)
    return told.exit_code


def signal_name(number: int) -> str:
    """Return the name of a signal, or its number if Python has no name for it, as for a real-time signal."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: list[BaseException] = []
    found: BaseException | None = error
    while found is not None and found not in seen:
        seen.append(found)
        yield found
        found = found.__cause__ or found.__context__


def own_file(path: str | Path) -> str | None:
    """Return a path for messages, such as "crqat/train/config.py", if a file belongs to crqat; None if it does not."""
    real = Path(path).resolve()
    for name, folder in _PARTS.items():
        if real.is_relative_to(folder):
            return f"crqat/{name}/{real.relative_to(folder).as_posix()}"
    return f"crqat/{real.name}" if real.parent == Path(__file__).parents[1].resolve() else None


def _of_environment(error: BaseException) -> str | None:
    """Return what is wrong with the machine and how to fix it; None if the machine is not at fault."""
    for found in _chain(error):
        text = _short(str(found))
        if isinstance(found, MemoryError) or any(words in text for words in _NO_MEMORY):
            return f"out of memory ({text or type(found).__name__}); take a smaller batch_size or smaller images"
        if "No usable temporary directory" in text:
            return "no temporary directory can be written to; make room, or set TMPDIR to a writable directory"
        if isinstance(found, OSError) and found.errno in _PLACE:
            name = "" if found.filename is None else f"{os.fsdecode(found.filename)}: "
            return f"{name}{found.strerror}; make room or give rights there, or choose another place (--runs, TMPDIR)"
        if any(words in text for words in _FULL):
            return f"{text}; make room there, or choose another place (--runs, TMPDIR)"
    return None


def _of_compiler(error: BaseException) -> bool:
    return any(type(found).__module__.startswith(("torch._inductor", "torch._dynamo")) for found in _chain(error))


def _place(error: BaseException) -> tuple[str, bool]:
    """Return FILE:LINE of the innermost line outside libraries ("" if none), and whether it is the user's code."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = os.path.realpath(frame.filename)
        own = own_file(path)
        if own is not None:
            if own != "crqat/core/failures.py":
                return f"{own}:{frame.lineno}", False
        elif Path(path).is_file() and not _of_library(path):
            return f"{frame.filename}:{frame.lineno}", True
    return "", False


def _of_library(path: str) -> bool:
    parts = Path(path).parts
    return "site-packages" in parts or "dist-packages" in parts or path.startswith(_LIBRARIES)


def _short(text: str) -> str:
    """Return the first 300 characters of a text as one line."""
    words = " ".join(text.split())
    return words if len(words) <= 300 else f"{words[:297]}..."


def _write(error: BaseException, run: Path | None) -> str:
    """Write the traceback to the first place that has room; return a phrase that says where."""
    content = _account(error)
    reason = "no place can hold it"
    for write in (_into_run, _into_temporary, _into_cache):
        try:
            path = write(content, run)
        except (OSError, RuntimeError) as problem:  # RuntimeError: the user has no home directory
            reason = getattr(problem, "strerror", None) or str(problem)
            continue
        if path is not None:
            return f"traceback in {path}"
    return f"the traceback could not be written ({reason}); set TMPDIR to a directory with room"


def _into_run(content: bytes, run: Path | None) -> Path | None:
    if run is None or not run.is_dir():
        return None
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    path = run / (f"traceback-rank{os.environ.get('RANK', '0')}.txt" if several else TRACEBACK)
    path.write_bytes(content)
    return path


def _into_temporary(content: bytes, _: Path | None) -> Path:
    return _created(content, tempfile.gettempdir())


def _into_cache(content: bytes, _: Path | None) -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "crqat"
    folder.mkdir(parents=True, exist_ok=True)
    return _created(content, str(folder))


def _created(content: bytes, folder: str) -> Path:
    """Create a new file with an unpredictable name, so that nobody else can have placed a file there."""
    descriptor, name = tempfile.mkstemp(prefix="crqat-traceback-", suffix=".txt", dir=folder)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
    except OSError:
        Path(name).unlink(missing_ok=True)  # a partial file would keep a full disk full
        raise
    return Path(name)


def _account(error: BaseException) -> bytes:
    """Return the content of a traceback file: time, command, versions and traceback."""
    versions = []
    for name in _DISTRIBUTIONS:
        with suppress(metadata.PackageNotFoundError):
            versions.append(f"{name} {metadata.version(name)}")
    head = [
        time.strftime("%Y-%m-%d %H:%M:%S %z"),
        f"command: {' '.join(sys.argv)}",
        f"Python {platform.python_version()}, {platform.platform()}",
        ", ".join(versions),
        "",
    ]
    lines = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    return ("\n".join(head) + lines).encode(errors="backslashreplace")
