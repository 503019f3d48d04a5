"""The `download` command: everything that a config reads from the hub, and whether it came whole (torch-free)."""

import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from zimage_train.config.schema import Model
from zimage_train.errors import Problem, WeightsError, ZImageTrainError, collected, raise_all
from zimage_train.io import atomic as files
from zimage_train.io.units import in_words
from zimage_train.models import locate as sources
from zimage_train.models.hub import client as hub
from zimage_train.models.hub.base import Remote
from zimage_train.models.locate import Fetch, NotDownloaded
from zimage_train.report.console import Console

POLL_SECONDS = 5.0
SPARE_BYTES = 1e9
"""Left free beside what is downloaded."""


class _Recorder:
    """Stands for the hub where it is only asked what is wanted of it."""

    def __init__(self) -> None:
        self.wanted: dict[tuple[str, str | None], list[str]] = {}

    def __call__(self, repository: str, revision: str | None, patterns: list[str]) -> Path:
        self.wanted.setdefault((repository, revision), []).extend(patterns)
        raise NotDownloaded


def wanted(model: Model, also: str | None) -> dict[tuple[str, str | None], list[str]]:
    """(Repository, revision) -> patterns of the files that `model` reads from the hub, as far as names alone tell.

    Raises:
        WeightsError: a part is neither here nor on the hub.
    """
    recorder = _Recorder()
    errors = [one for one in _search(model, also, recorder) if not isinstance(one, NotDownloaded)]
    raise_all(errors)
    return {key: list(dict.fromkeys(patterns)) for key, patterns in recorder.wanted.items()}


def _search(model: Model, also: str | None, fetch: Fetch) -> list[ZImageTrainError]:
    errors = list(sources.search(model, fetch).errors)
    if also is not None:
        with collected(errors):
            sources.transformer_at(also, "sample.also", fetch)
    return errors


def download(model: Model, also: str | None, console: Console, wait_minutes: float | None = None) -> list[str]:
    """Say what is missing and how much it takes, bring it, and compare all of it with the hub's digests.

    With `wait_minutes` another machine brings it into the same folder, and this one waits for so long.

    Raises:
        WeightsError: something cannot be had, or came damaged.
        DiskError: there is no room for it.
    """
    found = _remotes(model, also)
    if wait_minutes is not None:
        _wait(found, wait_minutes, console)
    if not found:
        raise_all(_search(model, also, sources.cached_only))
        return ["everything that this reads is on this machine, and nothing of it is from the hub"]
    console.say("\n".join(_table(found)))
    needed = sum(one.bytes for one in found if hub.local(one) is None)
    if needed:
        source = hub.chosen()
        todo = f"free some space, or set {source.CACHE_VARIABLE} to another disk"
        files.require_space(source.cache_folder(), int(needed + SPARE_BYTES), "the downloads", todo)
    fetcher = _Fetcher(console)
    with console.live():
        errors = _search(model, also, fetcher)
    raise_all(errors)
    size = sum(one.bytes for one in fetcher.whole)
    return [f"{len(fetcher.whole)} files, {in_words(size)}: all here, and what the hub has"]


def _remotes(model: Model, also: str | None) -> list[Remote]:
    errors: list[ZImageTrainError] = []
    found: list[Remote] = []
    for (repository, revision), patterns in wanted(model, also).items():
        with collected(errors):
            found += hub.remotes(repository, revision, patterns)
    raise_all(errors)
    return found


def _wait(found: list[Remote], minutes: float, console: Console) -> None:
    """Wait until each of `found` is here. A file is, once it is whole: what is still coming has another name."""
    end = time.monotonic() + minutes * 60
    with console.live():
        while missing := [one for one in found if hub.local(one) is None]:
            size = in_words(sum(one.bytes for one in missing))
            if time.monotonic() >= end:
                what = f"after {minutes:g} min {len(missing)} of {len(found)} files ({size}) are not here"
                todo = f"is the machine that downloads at work, into the same folder ({hub.chosen().cache_folder()})?"
                raise WeightsError(Problem(f"--wait: {missing[0].repository}/{missing[0].path}", what, todo))
            console.tick("waiting for files", len(found) - len(missing), len(found), f"{size} to come")
            time.sleep(min(POLL_SECONDS, max(0.0, end - time.monotonic())))


class _Fetcher:
    """The hub, each of whose files is brought if it is missing and compared with the hub's digest in any case."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self.whole: set[Remote] = set()

    def __call__(self, repository: str, revision: str | None, patterns: list[str]) -> Path:
        found = hub.remotes(repository, revision, patterns)
        new = [one for one in found if one not in self.whole]
        for number, one in enumerate(new, 1):
            here = hub.local(one)
            if here is None:
                self._console.tick("downloading", number, len(new), f"{one.path} ({in_words(one.bytes)})")
            path = here or hub.bring(one)
            self._console.tick("comparing digests", number, len(new), one.path)
            hub.require_whole(one, path)
            self.whole.add(one)
        return sources.download(repository, revision, patterns)  # which notes what the branch is at


def _table(found: Iterable[Remote]) -> list[str]:
    """What is wanted by repository and folder, and what of it is still to come."""
    whole: Counter[tuple[str, str]] = Counter()
    absent: Counter[tuple[str, str]] = Counter()
    for one in found:
        key = one.repository, one.path.partition("/")[0]
        whole[key] += one.bytes
        absent[key] += one.bytes if hub.local(one) is None else 0
    lines = []
    for (repository, part), size in whole.items():
        here = "here" if not absent[repository, part] else f"to download: {in_words(absent[repository, part])}"
        lines.append(f"{repository}  {part}: {in_words(size)}, {here}")
    return [*lines, f"to download: {in_words(absent.total())} of {in_words(whole.total())}"]
