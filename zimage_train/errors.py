"""The failures that a user can act on, and their exit codes.

Each consists of one or more `Problem`s (`where: what was found; what to do`), printed together and without a
traceback. Any other exception is a bug: it ends the program with exit code 1 and its traceback.
"""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Argument:
    """An option or argument of the command line, and the text given to it."""

    flag: str
    text: str | None = None

    def __str__(self) -> str:
        return self.flag if self.text is None else f"{self.flag} {self.text}"


@dataclass(frozen=True)
class Location:
    """A place in the settings of a command; a part is None if it is unknown or does not apply."""

    file: str | None = None
    line: int | None = None
    key: str | None = None
    """The full name of a setting, such as `optimizer.lr`."""
    source: str | None = None
    """The file, folder or hub id that the setting names."""
    argument: Argument | None = None
    """The argument that set it, if the command line did."""
    run: str | None = None
    """Label of the run, where a command has several."""

    def __str__(self) -> str:
        file = self.file if self.line is None else f"{self.file}:{self.line}"
        argument = None if self.argument is None else str(self.argument)
        return ": ".join(part for part in (self.run, argument, file, self.key, self.source) if part)


@dataclass(frozen=True)
class Problem:
    """An error: where it is, what was found there, and what to do about it."""

    location: Location | str
    """Plain text where it is not a setting: a file, a flag, a device."""
    message: str
    hint: str = ""
    code: str = ""
    """The kind of problem, for programs, such as `missing-file`; it stays the same when the message changes."""

    def __str__(self) -> str:
        return _printable(f"{self.location}: {self.message}" + (f"; {self.hint}" if self.hint else ""))

    @property
    def place(self) -> Location:
        """The location as a `Location`, which is empty if it is plain text."""
        return self.location if isinstance(self.location, Location) else Location()

    def of_run(self, run: str) -> "Problem":
        """Return the same problem with the label of the run that has it."""
        location = self.location if isinstance(self.location, Location) else Location(source=self.location)
        return replace(self, location=replace(location, run=run))


@dataclass(frozen=True)
class Note:
    """A line of a command's output, and a code by which programs select it."""

    code: str
    text: str

    def __str__(self) -> str:
        return self.text


def _printable(text: str) -> str:
    """Return `text` with control characters escaped, but for line ends.

    File names and values of a config are part of messages, and escape sequences in them would reach the terminal.
    """
    escaped: list[str] = []
    for character in text:
        is_safe = character.isprintable() or character == "\n"
        escaped.append(character if is_safe else repr(character)[1:-1])
    return "".join(escaped)


class ZImageTrainError(Exception):
    """A failure that a user can act on, with every problem that was found."""

    exit_code = 1

    def __init__(self, *problems: Problem) -> None:
        # Two checks can report the same problem, such as a missing model that two settings name.
        self.problems = tuple(dict.fromkeys(problems))
        super().__init__("\n".join(str(problem) for problem in self.problems))


class ConfigError(ZImageTrainError):
    """A setting, an option or an argument that is invalid."""

    exit_code = 2


class DataError(ZImageTrainError):
    """Images, captions, masks or their tables that are missing, damaged or unusable."""

    exit_code = 3


class WeightsError(ZImageTrainError):
    """Model weights, LoRA files or checkpoints that are missing, damaged or of the wrong kind."""

    exit_code = 4


class DivergedError(ZImageTrainError):
    """A training whose loss or weights are no longer finite."""

    exit_code = 5


class FolderInUseError(ZImageTrainError):
    """A run folder that another process holds."""

    exit_code = 6


class DiskError(ZImageTrainError):
    """A file or folder that cannot be written, or a disk without enough space."""

    exit_code = 7


class WorkerLostError(ZImageTrainError):
    """Another process of the same run has ended."""

    exit_code = 8


class Stopped(ZImageTrainError):
    """A run that a signal stopped; the same command continues it."""

    def __init__(self, signal_number: int, problem: Problem) -> None:
        super().__init__(problem)
        self.exit_code = 128 + signal_number


class SeveralErrors(ZImageTrainError):
    """Failures of several kinds, found together; the exit code is the lowest of theirs."""

    def __init__(self, errors: list[ZImageTrainError]) -> None:
        super().__init__(*(problem for error in errors for problem in error.problems))
        self.exit_code = min(error.exit_code for error in errors)


@contextlib.contextmanager
def collect_errors(errors: list[ZImageTrainError]) -> Iterator[None]:
    """Append a failure of the block to `errors`, and continue after the block."""
    try:
        yield
    except ZImageTrainError as error:
        errors.append(error)


def raise_all(errors: Iterable[ZImageTrainError]) -> None:
    """Raise the collected `errors` as a single error; do nothing if there are none.

    Raises:
        ZImageTrainError: the only error, or a `SeveralErrors` with the problems of all.
    """
    failures = [error for error in errors if error.problems]
    if len(failures) == 1:
        raise failures[0]
    if failures:
        raise SeveralErrors(failures)
