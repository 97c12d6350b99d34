"""The exceptions that people see as one line."""


class UsageError(ValueError):
    """A wrong option, file or shape. The message names the option, its value and the cure.

    The command line prints it as one line and exits with code 2; in Python it is an ordinary ``ValueError``.
    """


class TrainingError(RuntimeError):
    """Training that began well cannot go on. The message tells why and what to try.

    The command line prints it as one line and exits with code 1.
    """
