"""The one exception that means: what the user handed in is wrong."""


class InputError(ValueError):
    """Wrong input, told in one line: what is wrong, where, and what would be right.

    The command line prints it and exits with code 2; every other exception is our own fault
    and keeps its traceback.
    """
