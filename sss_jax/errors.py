"""The errors a user can meet, each with the exit code of the command line.

Every message says what is wrong, where, and how to mend it. Anything else that
reaches the command line is a bug and keeps its traceback.
"""


class SSSError(Exception):
    """Base of all errors raised on purpose; exit code 1."""

    exit_code = 1


class DataError(SSSError):
    """A file or a data set cannot be used: damaged, missing or inconsistent."""


class CheckpointError(SSSError):
    """A checkpoint is damaged, missing, or belongs to another run."""


class ConfigError(SSSError):
    """A setting or a command-line argument is unknown, out of range or contradictory."""

    exit_code = 2


class NonFiniteError(SSSError):
    """A loss, gradient or parameter is NaN or infinite; the update was not applied."""

    exit_code = 3


class Preempted(SSSError):
    """The process was asked to stop; the state is saved and the same command resumes."""

    exit_code = 75


class PeerLost(Preempted):
    """Another process of the run is gone; the last checkpoint stands."""
