"""What a user can get wrong, or meet, and the exit code that says which.

Every such failure is one or more `Problem`s (`where: what was found; what to do`), listed all at once and never
with a traceback. Any other exception is a bug of ours: exit code 1, with its traceback.
"""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Argument:
    """A word of the command line, and the text that was given to it."""

    flag: str
    text: str | None = None

    def __str__(self) -> str:
        return self.flag if self.text is None else f"{self.flag} {self.text}"


@dataclass(frozen=True)
class Location:
    """A place in the settings of a command; what is not known of it, or does not apply, is None."""

    file: str | None = None
    line: int | None = None
    key: str | None = None
    """The whole name of a setting, such as `optimizer.lr`."""
    source: str | None = None
    """The file, folder or hub id that the setting names."""
    argument: Argument | None = None
    """What of the command line set it."""
    run: str | None = None
    """Which of several runs."""

    def __str__(self) -> str:
        place = self.file if self.line is None else f"{self.file}:{self.line}"
        argument = None if self.argument is None else str(self.argument)
        return ": ".join(part for part in (self.run, argument, place, self.key, self.source) if part)


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: where it is, what was found there and what to do about it."""

    location: Location | str
    """A plain text where it is no setting: a file, a flag, a part of the machine."""
    message: str
    hint: str = ""
    code: str = ""
    """What kind of problem it is, for programs: a few words with hyphens, which stay when the message changes."""

    def __str__(self) -> str:
        return _printable(f"{self.location}: {self.message}" + (f"; {self.hint}" if self.hint else ""))

    @property
    def place(self) -> Location:
        """The location by its parts, as far as it has any."""
        return self.location if isinstance(self.location, Location) else Location()

    def of_run(self, run: str) -> "Problem":
        """The same problem as one of `run`, where there are several."""
        known = self.location if isinstance(self.location, Location) else Location(source=self.location)
        return replace(self, location=replace(known, run=run))


@dataclass(frozen=True)
class Note:
    """One line that a command says, and a code by which programs choose it."""

    code: str
    text: str

    def __str__(self) -> str:
        return self.text


def _printable(text: str) -> str:
    """`text` without what a name in a file could do to a terminal; line ends that we wrote ourselves stay."""
    return "".join(one if one.isprintable() or one == "\n" else repr(one)[1:-1] for one in text)


class ZImageTrainError(Exception):
    """A failure that a user can act on; carries every problem that was found."""

    exit_code = 1

    def __init__(self, *problems: Problem) -> None:
        self.problems = tuple(dict.fromkeys(problems))  # what two parts of a config run into is one problem
        super().__init__("\n".join(str(problem) for problem in self.problems))


class ConfigError(ZImageTrainError):
    exit_code = 2


class DataError(ZImageTrainError):
    exit_code = 3


class WeightsError(ZImageTrainError):
    """Model weights, LoRA files or checkpoints that are missing, damaged or of another kind."""

    exit_code = 4


class DivergedError(ZImageTrainError):
    exit_code = 5


class FolderInUseError(ZImageTrainError):
    exit_code = 6


class DiskError(ZImageTrainError):
    exit_code = 7


class WorkerLostError(ZImageTrainError):
    """Another process of the same run has ended."""

    exit_code = 8


class Stopped(ZImageTrainError):
    """The run was asked to stop by a signal and did so in good order."""

    def __init__(self, signal_number: int, problem: Problem) -> None:
        super().__init__(problem)
        self.exit_code = 128 + signal_number


class SeveralErrors(ZImageTrainError):
    """Failures of several kinds found together; the exit code is the lowest that applies."""

    def __init__(self, errors: list[ZImageTrainError]) -> None:
        super().__init__(*(problem for error in errors for problem in error.problems))
        self.exit_code = min(error.exit_code for error in errors)


@contextlib.contextmanager
def collect_errors(errors: list[ZImageTrainError]) -> Iterator[None]:
    """Put a failure of the block into `errors`, and go on after it."""
    try:
        yield
    except ZImageTrainError as error:
        errors.append(error)


def raise_all(errors: Iterable[ZImageTrainError]) -> None:
    """Raise everything collected in `errors` as one error; do nothing when there is none."""
    found = [error for error in errors if error.problems]
    if found:
        raise found[0] if len(found) == 1 else SeveralErrors(found)
