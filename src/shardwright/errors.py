"""Every error this package raises on purpose, drawn once.

    ShardwrightError                    1
    ├── UsageError (ValueError)         2   an argument, option or recipe is wrong
    ├── FileError                       3   a file is missing, damaged or not what it claims to be
    ├── UnsupportedError                4   asked for something this version does not do
    ├── CommError                       5   ranks disagree about a collective, or a handle was dropped
    └── RankError                       6   a rank raised or died
        └── AbortedError                6   this rank stopped because another one failed

The number is the process's exit code. A message fits on one or two lines and names attribute, value, constraint and
remedy; the command line prints it after `shardwright: ` and nothing else.
"""


class ShardwrightError(Exception):
    """Base of all errors raised on purpose."""

    exit_code = 1


class UsageError(ShardwrightError, ValueError):
    """An argument is wrong: `attribute=value: constraint; remedy`."""

    exit_code = 2

    def __init__(self, attribute: str, value: object, constraint: str, remedy: str) -> None:
        super().__init__(f"{attribute}={value}: {constraint}; {remedy}")


class FileError(ShardwrightError):
    """A file is missing, damaged or not what it claims to be: `path: problem; remedy`."""

    exit_code = 3

    def __init__(self, path: object, problem: str, remedy: str) -> None:
        super().__init__(f"{path}: {problem}; {remedy}")


class UnsupportedError(ShardwrightError):
    """Something this version does not do, with what to do instead."""

    exit_code = 4


class CommError(ShardwrightError):
    """Ranks disagree about a collective, or a handle was never waited for."""

    exit_code = 5


class RankError(ShardwrightError):
    """A rank raised or died: which one, where, and why."""

    exit_code = 6


class AbortedError(RankError):
    """This rank stopped waiting because another one failed: never the root cause."""
