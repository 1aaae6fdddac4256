"""Errors that end in one line for the user. Exit codes are part of the command line's contract.

0 pass, 1 the gate failed, 2 usage or recipe, 3 environment or tool, 4 the gate is inconclusive,
130 interrupted (SIGINT), 143 terminated (SIGTERM).
"""


class CrqatError(Exception):
    """Something a user can act on: the message names the cause and the fix, and no traceback is shown.

    Its text is one printable line, whatever the names and words in it: they may come from a file of a stranger's, and a
    terminal obeys control characters.
    """

    exit_code = 2

    def __str__(self) -> str:
        """The message."""
        words = " ".join(super().__str__().split())
        return "".join(letter if letter.isprintable() else "?" for letter in words)


class UsageError(CrqatError):
    """The recipe, an argument or an input file is wrong."""

    exit_code = 2


class ToolError(CrqatError):
    """The environment is wrong: a tool is missing, a directory cannot be written, a runtime died."""

    exit_code = 3


class Interrupted(CrqatError):
    """The process was asked to end, and what it did is saved; the exit code is a shell's, 128 + the signal."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal
