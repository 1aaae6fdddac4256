"""Errors that are shown to the user as one line. Exit codes are part of the command line's contract.

0 pass, 1 a measured failure, 2 usage or recipe error, 3 environment, tool or internal error, 4 inconclusive, 130
interrupted (SIGINT), 141 the reader of the output has gone (SIGPIPE), 143 terminated (SIGTERM). No error exits with 1.
Python exits with 1 after an unexpected exception; `crqat.core.failures` therefore converts it to one of these errors.
"""


class CrqatError(Exception):
    """An error that the user can fix: the message names the cause and the fix, and no traceback is shown.

    The message is one printable line. Control characters are stripped: names in the message may come from an untrusted
    file.
    """

    exit_code = 2

    def __str__(self) -> str:
        """Return the message without control characters."""
        words = " ".join(super().__str__().split())
        return "".join(letter if letter.isprintable() else "?" for letter in words)


class UsageError(CrqatError):
    """Raised if the recipe, an argument or an input file is wrong."""

    exit_code = 2


class VerificationError(UsageError):
    """Raised if an exported file does not compute what the trained network computes; no file is kept."""


class ToolError(CrqatError):
    """Raised if the environment is at fault: a tool is missing, a directory is not writable, or a runtime crashed."""

    exit_code = 3


class InternalError(ToolError):
    """Raised in place of an unexpected exception in crqat's own code; `crqat.core.failures` makes its message."""

    # Raised by one of several training processes; the launcher may restart them, which may help.
    exit_code_of_rank = 70


class Told(SystemExit):
    """Raised, instead of SystemExit, to end the process after its error was printed; no further message is shown.

    A SystemExit that is not of this class comes from other code, such as code of the user, and is reported as an error.
    """


class Interrupted(CrqatError):
    """Raised if a signal asked the process to end, after saving its work if possible; exits with 128 + the signal."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal
