"""The one exception that means that the user's input is wrong; and programs that print it."""

import sys
from collections.abc import Callable


class InputError(ValueError):
    """Wrong input, in one line: what is wrong, where, and what would be right.

    The command line prints it and exits with code 2; every other exception is our own fault
    and keeps its traceback.
    """


def script(main: Callable[[], int | None]) -> None:
    """Runs a program beside the command line, and exits: with 2 after an `InputError`, which it
    prints as one line, else with the code that it returns, 0 for None."""
    try:
        sys.exit(main() or 0)
    except InputError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
