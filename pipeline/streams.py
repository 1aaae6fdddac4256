"""Makes stdout and stderr safe: no traceback if they are closed, full, unread or limited to ASCII."""

from __future__ import annotations

import os
import select
import sys
from contextlib import suppress
from pathlib import Path


def prepare() -> None:
    """Open all three standard streams and let them accept every character; a closed stream becomes /dev/null."""
    for number in range(3):
        with suppress(OSError):
            os.fstat(number)
            continue
        os.open(os.devnull, os.O_RDWR)
    sys.stdout = sys.stdout or Path(os.devnull).open("w")  # noqa: SIM115 - as long as the process lives
    sys.stderr = sys.stderr or Path(os.devnull).open("w")  # noqa: SIM115 - as long as the process lives
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def nobody_reads() -> bool:
    """Return whether the process that reads stdout or stderr has closed it, as `head -1` does after one line."""
    poll = select.poll()
    for number in (1, 2):
        poll.register(number, 0)
    return any(what & select.POLLERR for _, what in poll.poll(0))


def flush() -> OSError | None:
    """Flush stdout and stderr and return the last error, if any; a failing stream is replaced by /dev/null."""
    found: OSError | None = None
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as error:  # noqa: PERF203 - of two
            found = error
            with suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return found
