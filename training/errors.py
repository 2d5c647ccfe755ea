"""The two kinds of error that a user can cause. The command line prints them as one line, without a traceback."""


class UserError(Exception):
    """A user's mistake found while working (missing file, wrong column, damaged checkpoint): exit status 1.

    The message names the thing, its value, and what to do.
    """


class UsageError(UserError):
    """A wrong command line or recipe (unknown setting, value out of range): exit status 2."""


def one_line(error: BaseException, length: int = 600) -> str:
    """Return an error's message on one line, cut to `length` characters."""
    return " ".join(str(error).split())[:length]
