"""The one exception for mistakes that the user can mend."""


class UsageError(ValueError):
    """A wrong option, file or shape. The message names the option, its value and the cure.

    The command line prints it as one line and exits with code 2; in Python it is an ordinary ``ValueError``.
    """
