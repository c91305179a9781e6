"""The one exception that stands for a user's mistake."""


class UserError(ValueError):
    """A mistake of the user's, told in one line: what, where, its value and the fix.

    The command line prints the line without a traceback and exits with code 2; from Python it is
    an ordinary ValueError.
    """
