"""Failures a user can act on. Each is one line naming the thing, what was expected and what was found.

Wrong arguments and settings are plain ValueError and TypeError. The command line turns all of them into that line and
an exit code: 2 usage, 3 bad file, 4 environment, 5 training gave up.
"""


class BadFileError(ValueError):
    """A file is not what it should be: truncated, hostile, of the wrong kind. Exit code 3."""


class EnvironmentProblemError(RuntimeError):
    """The machine, the installed packages or the file system cannot do what was asked. Exit code 4."""


class TrainingFailedError(RuntimeError):
    """Training cannot go on. Exit code 5."""
