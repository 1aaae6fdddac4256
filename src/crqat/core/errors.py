"""Errors that end in one line for the user. Exit codes are part of the command line's contract.

0 pass, 1 measured and judged a failure, 2 usage or recipe, 3 environment, tool or internal error, 4 inconclusive,
130 interrupted (SIGINT), 141 nobody reads the output (SIGPIPE), 143 terminated (SIGTERM). No error ends with 1, though
Python itself ends with it after an exception: `crqat.core.failures` sees to that.
"""


class CrqatError(Exception):
    """Something a user can act on: the message names the cause and the fix, and no traceback is shown.

    Its text is one printable line, whatever the names and words in it: they may come from an untrusted file,
    and a terminal obeys control characters.
    """

    exit_code = 2

    def __str__(self) -> str:
        """The message."""
        words = " ".join(super().__str__().split())
        return "".join(letter if letter.isprintable() else "?" for letter in words)


class UsageError(CrqatError):
    """The recipe, an argument or an input file is wrong."""

    exit_code = 2


class VerificationError(UsageError):
    """Files were made that do not compute what the trained network computes; none of them is left behind."""


class ToolError(CrqatError):
    """The environment is wrong: a tool is missing, a directory cannot be written, a runtime died."""

    exit_code = 3


class InternalError(ToolError):
    """An exception that nobody expected, in one line; see `crqat.core.failures`."""

    # Of one of several processes of a training: who started them may start them again, which may help.
    exit_code_of_rank = 70


class Told(SystemExit):
    """The process ends, and what there is to say has been said. Any other SystemExit is somebody else's."""


class Interrupted(CrqatError):
    """The process was asked to end, and what it did is saved; the exit code is a shell's, 128 + the signal."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal
