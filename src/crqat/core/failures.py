"""Exceptions that nobody expected, as one line: whose fault it is, where it was raised, where the traceback lies."""

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
# What the operating system says of a place, of rights or of a limit: nothing that another recipe or other code mends.
_PLACE = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO, errno.EACCES, errno.EPERM),
    *(errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ENOTCONN, errno.ENODEV, errno.ENXIO),
)
# Libraries wrap these words into exceptions of their own.
_FULL = tuple(os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS))
_NO_MEMORY = ("can't allocate memory", "out of memory", "Cannot allocate memory")
# In a checkout most of crqat's parts are links, so that a traceback may name a file in two ways.
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
    """Let errors of crqat's own pass, and make one of each other exception.

    A broken pipe passes, too: whether it is that of the output is known to whoever prints.

    Args:
        what: The stage or command, for the message.
        run: The run's directory, which gets the traceback; None is a temporary one.

    Raises:
        CrqatError: As `explain` says.
    """
    try:
        yield
    except (CrqatError, Told, BrokenPipeError):
        raise
    except (Exception, SystemExit) as error:
        raise explain(error, what, run) from error


def explain(error: BaseException, what: str, run: Path | None = None) -> CrqatError:
    """The one line for an exception that nobody expected.

    Args:
        error: A full disk, no memory and the like are the environment's, whoever was hit by them. Of the rest, the
            innermost line that is in no library tells whether it is crqat's error or that of the user's own code.
        what: The stage or command.
        run: The run's directory, None if there is none yet.

    Returns:
        ToolError: The environment's; there is no traceback.
        UsageError: The user's code raised it, or ended the process; the message names file and line.
        InternalError: The message says where the traceback was written and how to report it.
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
    """Say in one line on standard error what ends a program, a broken pipe but for its own; give the exit code."""
    told = error if isinstance(error, CrqatError) else explain(error, program)
    with suppress(OSError):
        print(f"{program}: {told}" if isinstance(error, CrqatError) else told, file=sys.stderr, flush=True)
    return told.exit_code


def signal_name(number: int) -> str:
    """A signal's name; of one that Python has no name for, such as a real-time signal, its number."""
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
    """A file of crqat itself by its place in the package, such as "crqat/train/config.py"; None if it is none."""
    real = Path(path).resolve()
    for name, folder in _PARTS.items():
        if real.is_relative_to(folder):
            return f"crqat/{name}/{real.relative_to(folder).as_posix()}"
    return f"crqat/{real.name}" if real.parent == Path(__file__).parents[1].resolve() else None


def _of_environment(error: BaseException) -> str | None:
    """What of the machine is wrong, and what to do; None if it is something else."""
    for found in _chain(error):
        text = _short(str(found))
        if isinstance(found, MemoryError) or any(words in text for words in _NO_MEMORY):
            return f"out of memory ({text or type(found).__name__}); take a smaller batch_size or smaller images"
        if "No usable temporary directory" in text:
            return "no temporary directory can be written to; make room, or set TMPDIR to one that can"
        if isinstance(found, OSError) and found.errno in _PLACE:
            name = "" if found.filename is None else f"{os.fsdecode(found.filename)}: "
            return f"{name}{found.strerror}; make room or give rights there, or choose another place (--runs, TMPDIR)"
        if any(words in text for words in _FULL):
            return f"{text}; make room there, or choose another place (--runs, TMPDIR)"
    return None


def _of_compiler(error: BaseException) -> bool:
    return any(type(found).__module__.startswith(("torch._inductor", "torch._dynamo")) for found in _chain(error))


def _place(error: BaseException) -> tuple[str, bool]:
    """FILE:LINE of the innermost line that is in no library, empty if there is none; whether that is the user's."""
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
    """The first 300 characters in one line."""
    words = " ".join(text.split())
    return words if len(words) <= 300 else f"{words[:297]}..."


def _write(error: BaseException, run: Path | None) -> str:
    """Write the traceback where there is room, and say where."""
    content = _account(error)
    reason = "no place can take it"
    for write in (_into_run, _into_temporary, _into_cache):
        try:
            path = write(content, run)
        except (OSError, RuntimeError) as problem:  # the latter of a user without a home
            reason = getattr(problem, "strerror", None) or str(problem)
            continue
        if path is not None:
            return f"traceback in {path}"
    return f"the traceback could not be written ({reason}); with a TMPDIR that has room it can"


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
    """A new file, by a name that nobody else can have put there."""
    descriptor, name = tempfile.mkstemp(prefix="crqat-traceback-", suffix=".txt", dir=folder)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
    except OSError:
        Path(name).unlink(missing_ok=True)  # half a file would keep a full disk full
        raise
    return Path(name)


def _account(error: BaseException) -> bytes:
    """The traceback below what a reader of it has to know."""
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
