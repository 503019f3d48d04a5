"""Bytes made to break a reader, and the check that it answers them: with a result or a declared error, soon, in little
memory."""

import ctypes
import itertools
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from zimage_train.errors import ZImageTrainError

CORPUS = Path(__file__).parents[1] / "faults" / "corpus"
SECONDS, HANG_SECONDS = 4.0, 20
"""Processor time that a case may take on a slow machine that fills memory as well, and after which it is ended."""
MEGABYTES = 200
"""Memory that a case may take beyond what the process had, unless its reader says otherwise."""
CASES = int(os.environ.get("FUZZ_CASES", "0"))
"""Cases of each test, drawn at random; 0: a few, the same each time."""
MEMORY = Path("/proc/self/status")
M_PERTURB = -6
"""In glibc's malloc.h; see `man mallopt`."""
_TOKEN = re.compile(rb'"(?:\\.|[^"\\])*"|[\w.+-]+')

HOSTILE_TOKENS = [
    *b"null true false -1 0 1e400 -1e400 NaN Infinity .nan .inf 1e308 5e-324 9223372036854775808 0x1f".split(),
    *b"12:30:45 2024-01-01 = ~ [] {} [[]] {a:{}} [null] &a *a ? --- %s%n {0} ../../etc/passwd /dev/zero".split(),
    *(b'""', b"''", b'{"a": {}}', b'"\\ud800"', b'"\\u0000"', b"&a [*a, *a]", b"!!python/object:os.system"),
    *(b"1" + b"0" * 400, b"1" + b"0" * 5000, b"\xed\xa0\x80", b"\xff", b"(((((a+)+)+)+)+)$", b"\x1b[2J"),
    *("\u2028".encode(), "\u202e".encode(), "\U0001f600".encode(), b"? [a, b] : c", b"<<: *a", b"[" * 2000),
]


@dataclass(frozen=True)
class FileReader:
    """A reader of a file that a user or a stranger may give."""

    name: str
    """That of its folder in the corpus."""
    file: str
    """The name that the file has."""
    read: Callable[[Path], object] = field(repr=False)
    """Read all that the program ever reads from the file at this path."""
    seeds: Callable[[Path], list[bytes]] = field(repr=False)
    """Return valid files, which the reader must accept; they are made in the given folder."""
    container: str = ""
    """The folder of the corpus with files of the format that its own format is made of."""
    megabytes: int = MEGABYTES
    """Memory that a case may take beyond what the process had."""

    def corpus(self) -> list[Path]:
        folders = [CORPUS / self.name, *([CORPUS / self.container] if self.container else [])]
        return sorted(itertools.chain.from_iterable(folder.glob("*") for folder in folders))


class Seeds(tuple[bytes, ...]):
    """Valid files, which are too long to be printed with a failure."""

    def __repr__(self) -> str:
        return f"<{len(self)} files>"


class Hang(BaseException):
    """A reader that did not end."""


@contextmanager
def _watchdog() -> Iterator[None]:
    """End the block if it takes `HANG_SECONDS` of processor time, where the system can."""
    if not hasattr(signal, "setitimer"):
        yield
        return

    def end(number: int, frame: object) -> None:
        raise Hang(f"not done after {HANG_SECONDS} s")

    before = signal.signal(signal.SIGPROF, end)
    signal.setitimer(signal.ITIMER_PROF, HANG_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def _megabytes(name: str) -> float:
    """The memory of this process: `VmRSS` is what it has now, `VmHWM` the most since `_forget_peak`."""
    line = next(line for line in MEMORY.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1000


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


@contextmanager
def _filled_memory() -> Iterator[None]:
    """Within the block, let glibc write to all memory that it hands out.

    A block that is reserved and never written to would count or not, by what earlier tests had freed.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if MEMORY.exists() else None
    if mallopt is None:
        yield
        return
    mallopt(M_PERTURB, 85)
    try:
        yield
    finally:
        mallopt(M_PERTURB, 0)


def answer(reader: FileReader, path: Path, content: bytes) -> ZImageTrainError | None:
    """Let `reader` read `content`; return the error that it declares, if any.

    Anything but a result or a declared error with a message, within the bounds of time and memory, fails.
    """
    path.write_bytes(content)
    is_measured = MEMORY.exists()
    before = 0.0
    if is_measured:
        _forget_peak()
        before = _megabytes("VmRSS")
    began, refusal = time.process_time(), None
    with _watchdog(), _filled_memory():
        try:
            reader.read(path)
        except ZImageTrainError as error:
            refusal = error
    seconds = time.process_time() - began
    assert seconds < SECONDS, f"took {seconds:.1f} s"
    if is_measured:
        used = _megabytes("VmHWM") - before
        assert used < reader.megabytes, f"took {used:.0f} MB"
    if refusal is not None:
        assert refusal.problems and all(problem.code and problem.message for problem in refusal.problems)
        str(refusal).encode()  # it can be printed
    return refusal


def fuzzed(cases: int) -> Any:
    """The settings of a test that runs the same `cases` each time, or `FUZZ_CASES` random ones."""
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
    if CASES:
        return settings(max_examples=CASES, deadline=None, suppress_health_check=checks, database=None)
    return settings(max_examples=cases, deadline=None, suppress_health_check=checks, database=None, derandomize=True)


Edit = Callable[[bytes], bytes]
_place = st.floats(0.0, 1.0, exclude_max=True)
_pieces = st.binary(min_size=1, max_size=12) | st.sampled_from(HOSTILE_TOKENS)


def _flip(place: float, bits: int) -> Edit:
    def edit(content: bytes) -> bytes:
        if not content:
            return content
        at = int(place * len(content))
        return content[:at] + bytes([content[at] ^ bits]) + content[at + 1 :]

    return edit


def _cut(place: float, length: int) -> Edit:
    def edit(content: bytes) -> bytes:
        at = int(place * len(content))
        return content[:at] + content[at + length :]

    return edit


def _end_at(place: float) -> Edit:
    return lambda content: content[: int(place * len(content))]


def _repeat(place: float, length: int, times: int) -> Edit:
    def edit(content: bytes) -> bytes:
        at = int(place * len(content))
        return content[:at] + content[at : at + length] * times + content[at + length :]

    return edit


def _insert(place: float, piece: bytes) -> Edit:
    def edit(content: bytes) -> bytes:
        at = int(place * len(content))
        return content[:at] + piece + content[at:]

    return edit


def _replace_token(place: float, piece: bytes | float) -> Edit:
    """Replace a word, a number or a quoted text, which leaves the rest of a text file valid.

    `piece` is the new text, or the place of another token to copy, from 0 to 1.
    """

    def edit(content: bytes) -> bytes:
        tokens = list(_TOKEN.finditer(content))
        if not tokens:
            return content
        token = tokens[int(place * len(tokens))]
        new = piece if isinstance(piece, bytes) else tokens[int(piece * len(tokens))][0]
        return content[: token.start()] + new + content[token.end() :]

    return edit


edits = st.one_of(
    st.builds(_replace_token, _place, st.sampled_from(HOSTILE_TOKENS)),
    st.builds(_replace_token, _place, _place),
    st.builds(_flip, _place, st.integers(1, 255)),
    st.builds(_insert, _place, _pieces),
    st.builds(_cut, _place, st.integers(1, 200)),
    st.builds(_repeat, _place, st.integers(1, 200), st.integers(2, 40)),
    st.builds(_end_at, _place),
)


def mutated(seed: bytes, changes: list[Edit]) -> bytes:
    """`seed` after one change after another."""
    for change in changes:
        seed = change(seed)
    return seed


def few_edits() -> st.SearchStrategy[list[Edit]]:
    return st.lists(edits, min_size=1, max_size=4)
