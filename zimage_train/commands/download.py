"""The `download` command: download and verify the files that a config needs from the hub (torch-free)."""

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
"""Space to leave free on the disk."""


class _RecordingFetch:
    """A `DownloadFn` that downloads nothing and records what it is asked for."""

    def __init__(self) -> None:
        self.requested: dict[tuple[str, str | None], list[str]] = {}

    def __call__(self, repository: str, revision: str | None, patterns: list[str]) -> Path:
        self.requested.setdefault((repository, revision), []).extend(patterns)
        raise NotDownloadedError


def required_files(model: ModelSettings, second_model: str | None) -> dict[tuple[str, str | None], list[str]]:
    """Return (repository, revision) -> patterns of the files that a run reads from the hub.

    Args:
        second_model: `sample.compare_on`, of which only the transformer is read.

    Raises:
        WeightsError: a part of a model is neither on this machine nor on the hub.
    """
    fetch = _RecordingFetch()
    raise_all(error for error in _find_parts(model, second_model, fetch) if not isinstance(error, NotDownloadedError))
    return {key: list(dict.fromkeys(patterns)) for key, patterns in fetch.requested.items()}


def _find_parts(model: ModelSettings, second_model: str | None, fetch: DownloadFn) -> list[ZImageTrainError]:
    """Look for every part of the models, by `fetch` where a part is on the hub, and return the errors."""
    errors = list(locate.find_paths(model, fetch).errors)
    if second_model is not None:
        with collect_errors(errors):
            locate.transformer_at(second_model, Location(key="sample.compare_on"), fetch)
    return errors


def download_models(
    model: ModelSettings, second_model: str | None, console: Console, wait_minutes: float | None = None
) -> list[str]:
    """Print the size of all files, download those that are missing, and verify all; return the lines to print.

    Args:
        second_model: `sample.compare_on`.
        wait_minutes: if given, wait so long for another machine to download the files into the same folder.

    Raises:
        WeightsError: a file cannot be obtained, or differs from the hub's.
        DiskError: the disk has too little free space.
    """
    files = _list_files(model, second_model)
    if wait_minutes is not None:
        _wait_for(files, wait_minutes, console)
    if not files:
        raise_all(_find_parts(model, second_model, locate.cached_only))
        return ["all needed files are local paths on this machine, so nothing is downloaded"]
    console.info("\n".join(_size_lines(files)))
    missing_bytes = sum(file.bytes for file in files if client.cached_path(file) is None)
    if missing_bytes:
        hub = client.selected_hub()
        hint = f"free some space, or set {hub.CACHE_VARIABLE} to another disk"
        atomic.require_free_space(hub.cache_folder(), int(missing_bytes + SPARE_BYTES), "the downloads", hint)
    fetch = _VerifyingFetch(console)
    with console.live_progress():
        errors = _find_parts(model, second_model, fetch)
    raise_all(errors)
    size = sum(file.bytes for file in fetch.verified)
    return [f"{len(fetch.verified)} files, {format_bytes(size)}: all on this machine, and equal to the hub's"]


def _list_files(model: ModelSettings, second_model: str | None) -> list[RemoteFile]:
    errors: list[ZImageTrainError] = []
    files: list[RemoteFile] = []
    for (repository, revision), patterns in required_files(model, second_model).items():
        with collect_errors(errors):
            files += client.list_files(repository, revision, patterns)
    raise_all(errors)
    return files


def _wait_for(files: list[RemoteFile], minutes: float, console: Console) -> None:
    """Wait until all files are in the cache.

    A file counts only when it is complete: while the other machine downloads it, it has another name.

    Raises:
        WeightsError: some files are still missing after so many minutes.
    """
    end = time.monotonic() + minutes * 60
    with console.live_progress():
        while missing := [file for file in files if client.cached_path(file) is None]:
            size = format_bytes(sum(file.bytes for file in missing))
            if time.monotonic() >= end:
                where = f"--wait: {missing[0].repository}/{missing[0].path}"
                what = f"after {minutes:g} min {len(missing)} of {len(files)} files ({size}) are still missing"
                cache = client.selected_hub().cache_folder()
                hint = f"check that the other machine is downloading, into the same folder ({cache})"
                raise WeightsError(Problem(where, what, hint, "not-downloaded"))
            console.progress("waiting for files", len(files) - len(missing), len(files), f"{size} missing")
            time.sleep(min(POLL_SECONDS, max(0.0, end - time.monotonic())))


class _VerifyingFetch:
    """A `DownloadFn` that downloads missing files and compares every file with the hub's digest."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self.verified: set[RemoteFile] = set()

    def __call__(self, repository: str, revision: str | None, patterns: list[str]) -> Path:
        files = client.list_files(repository, revision, patterns)
        unverified = [file for file in files if file not in self.verified]
        for number, file in enumerate(unverified, 1):
            path = client.cached_path(file)
            if path is None:
                note = f"{file.path} ({format_bytes(file.bytes)})"
                self._console.progress("downloading", number, len(unverified), note)
                path = client.download_file(file)
            self._console.progress("verifying", number, len(unverified), file.path)
            client.require_intact(file, path)
            self.verified.add(file)
        # Nothing is left to download, but this call also records the commit of the branch, for use without the hub.
        return locate.download(repository, revision, patterns)


def _size_lines(files: Iterable[RemoteFile]) -> list[str]:
    """Return the size of each repository's folders, and how much of it is to be downloaded."""
    total_bytes: Counter[tuple[str, str]] = Counter()
    missing_bytes: Counter[tuple[str, str]] = Counter()
    for file in files:
        part = file.repository, file.path.partition("/")[0]
        total_bytes[part] += file.bytes
        if client.cached_path(file) is None:
            missing_bytes[part] += file.bytes
    lines = []
    for part, size in total_bytes.items():
        repository, folder = part
        status = f"to download: {format_bytes(missing_bytes[part])}" if missing_bytes[part] else "already downloaded"
        lines.append(f"{repository}  {folder}: {format_bytes(size)}, {status}")
    return [*lines, f"to download: {format_bytes(missing_bytes.total())} of {format_bytes(total_bytes.total())}"]
