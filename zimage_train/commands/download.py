"""The `download` command: everything that a config reads from the hub, and whether it came whole (torch-free)."""

import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from zimage_train.config.schema import ModelSettings
from zimage_train.errors import Location, Problem, WeightsError, ZImageTrainError, collect_errors, raise_all
from zimage_train.io import atomic
from zimage_train.io.units import format_bytes
from zimage_train.models import locate
from zimage_train.models.hub import client
from zimage_train.models.hub.base import RemoteFile
from zimage_train.models.locate import DownloadFn, NotDownloadedError
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
        raise NotDownloadedError


def required_files(model: ModelSettings, also: str | None) -> dict[tuple[str, str | None], list[str]]:
    """(Repository, revision) -> patterns of the files that `model` reads from the hub, as far as names alone tell.

    Raises:
        WeightsError: a part is neither here nor on the hub.
    """
    recorder = _Recorder()
    errors = [one for one in _search(model, also, recorder) if not isinstance(one, NotDownloadedError)]
    raise_all(errors)
    return {key: list(dict.fromkeys(patterns)) for key, patterns in recorder.wanted.items()}


def _search(model: ModelSettings, also: str | None, fetch: DownloadFn) -> list[ZImageTrainError]:
    errors = list(locate.find_paths(model, fetch).errors)
    if also is not None:
        with collect_errors(errors):
            locate.transformer_at(also, Location(key="sample.compare_on"), fetch)
    return errors


def download_models(
    model: ModelSettings, also: str | None, console: Console, wait_minutes: float | None = None
) -> list[str]:
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
        raise_all(_search(model, also, locate.cached_only))
        return ["everything that this reads is on this machine, and nothing of it is from the hub"]
    console.info("\n".join(_table(found)))
    needed = sum(one.bytes for one in found if client.cached_path(one) is None)
    if needed:
        source = client.selected_hub()
        todo = f"free some space, or set {source.CACHE_VARIABLE} to another disk"
        atomic.require_free_space(source.cache_folder(), int(needed + SPARE_BYTES), "the downloads", todo)
    fetcher = _Fetcher(console)
    with console.live_progress():
        errors = _search(model, also, fetcher)
    raise_all(errors)
    size = sum(one.bytes for one in fetcher.whole)
    return [f"{len(fetcher.whole)} files, {format_bytes(size)}: all here, and what the hub has"]


def _remotes(model: ModelSettings, also: str | None) -> list[RemoteFile]:
    errors: list[ZImageTrainError] = []
    found: list[RemoteFile] = []
    for (repository, revision), patterns in required_files(model, also).items():
        with collect_errors(errors):
            found += client.list_files(repository, revision, patterns)
    raise_all(errors)
    return found


def _wait(found: list[RemoteFile], minutes: float, console: Console) -> None:
    """Wait until each of `found` is here. A file is, once it is whole: what is still coming has another name."""
    end = time.monotonic() + minutes * 60
    with console.live_progress():
        while missing := [one for one in found if client.cached_path(one) is None]:
            size = format_bytes(sum(one.bytes for one in missing))
            if time.monotonic() >= end:
                what = f"after {minutes:g} min {len(missing)} of {len(found)} files ({size}) are not here"
                cache = client.selected_hub().cache_folder()
                todo = f"is the machine that downloads at work, into the same folder ({cache})?"
                raise WeightsError(Problem(f"--wait: {missing[0].repository}/{missing[0].path}", what, todo))
            console.progress("waiting for files", len(found) - len(missing), len(found), f"{size} to come")
            time.sleep(min(POLL_SECONDS, max(0.0, end - time.monotonic())))


class _Fetcher:
    """The hub, each of whose files is brought if it is missing and compared with the hub's digest in any case."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self.whole: set[RemoteFile] = set()

    def __call__(self, repository: str, revision: str | None, patterns: list[str]) -> Path:
        found = client.list_files(repository, revision, patterns)
        new = [one for one in found if one not in self.whole]
        for number, one in enumerate(new, 1):
            here = client.cached_path(one)
            if here is None:
                self._console.progress("downloading", number, len(new), f"{one.path} ({format_bytes(one.bytes)})")
            path = here or client.download_file(one)
            self._console.progress("comparing digests", number, len(new), one.path)
            client.require_intact(one, path)
            self.whole.add(one)
        return locate.download(repository, revision, patterns)  # which notes what the branch is at


def _table(found: Iterable[RemoteFile]) -> list[str]:
    """What is wanted by repository and folder, and what of it is still to come."""
    whole: Counter[tuple[str, str]] = Counter()
    absent: Counter[tuple[str, str]] = Counter()
    for one in found:
        key = one.repository, one.path.partition("/")[0]
        whole[key] += one.bytes
        absent[key] += one.bytes if client.cached_path(one) is None else 0
    lines = []
    for (repository, part), size in whole.items():
        here = "here" if not absent[repository, part] else f"to download: {format_bytes(absent[repository, part])}"
        lines.append(f"{repository}  {part}: {format_bytes(size)}, {here}")
    return [*lines, f"to download: {format_bytes(absent.total())} of {format_bytes(whole.total())}"]
