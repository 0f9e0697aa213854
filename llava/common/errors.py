"""The exception for bad input, and the one place that turns it into one sentence and exit code 2."""

import functools
import os
import sys
import time
import warnings

RANK_DELAY = 5  # seconds: bad input is nearly always bad for rank 0 too, which says it and thereby ends the others


class UserError(Exception):
    """Bad input: the message is one sentence that says what was found, where, and what is allowed."""


def first_line(error: BaseException) -> str:
    """First line of an exception's message, or its type name if it has none. Libraries append paragraphs of advice."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def exits_cleanly(main):
    """Decorator of a command's main(): a UserError becomes one line on stderr and exit code 2.

    Warnings become one line, too.
    """

    @functools.wraps(main)
    def wrapper(*args, **kwargs):
        before, warnings.formatwarning = warnings.formatwarning, _warning_line
        try:
            return main(*args, **kwargs)
        except UserError as error:
            if os.environ.get("RANK", "0") != "0":
                time.sleep(RANK_DELAY)
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        finally:
            # Tests and other commands call main() in one process, so the change must not outlive the call.
            warnings.formatwarning = before

    return wrapper


def _warning_line(message, *_, **__) -> str:
    """A warning as one line, without the place in the code that issued it."""
    return f"warning: {' '.join(str(message).split())}\n"
