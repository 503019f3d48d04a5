"""Changes of many captions at once, with their undo."""

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from zimage_train.config import triggers
from zimage_train.errors import DataError, Problem, ZImageTrainError
from zimage_train.ui.image_folder import ImageFolder, tags_of

MAX_UNDO = 50
"""Edits that can be undone."""

Change = Callable[[str], str]
"""Returns the new caption for an old one; the same if it does not change."""


def count_tags(captions: Iterable[str]) -> list[tuple[str, int]]:
    """Return (tag, number of captions that have it), the most frequent first."""
    counts: Counter[str] = Counter()
    for caption in captions:
        counts.update(dict.fromkeys(tags_of(caption), 1))
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def replacing(search: str, words: str, matches_case: bool = False) -> Change:
    """Return the change that writes `words` wherever `search` stands.

    Raises:
        DataError: there is nothing to search for.
    """
    if not search:
        raise DataError(Problem("search", "is empty", "give the text to replace", "bad-argument"))
    pattern = re.compile(re.escape(search), 0 if matches_case else re.IGNORECASE)
    return lambda caption: pattern.sub(lambda _: words, caption)


def renaming_tag(tag: str, new: str) -> Change:
    """Return the change that writes the tag `new` for `tag`, once; an empty `new` removes the tag.

    Raises:
        DataError: `new` is several tags.
    """
    new = new.strip()
    if "," in new or "\n" in new:
        raise DataError(Problem(f"tag {new!r}", "has a comma", "give a single tag", "bad-argument"))

    def change(caption: str) -> str:
        return "\n".join(map(change_line, caption.split("\n")))

    def change_line(line: str) -> str:
        tags = tags_of(line)
        if tag not in tags:
            return line
        renamed = [new if other == tag else other for other in tags]
        return ", ".join(other for other in dict.fromkeys(renamed) if other)

    return change


def writing_where_empty(text: str) -> Change:
    """Return the change that writes `text` as the caption of images that have none."""
    return lambda caption: caption or text


def spelling_trigger(trigger: str) -> Change:
    """Return the change that writes the trigger as it is spelt, wherever it stands in another case."""
    return lambda caption: triggers.insert_trigger(caption, trigger)


@dataclass(frozen=True)
class EditResult:
    """The result of an edit."""

    changed: list[str]
    """Names of the images whose caption was changed."""
    errors: list[ZImageTrainError]
    """Why others were not."""


@dataclass
class CaptionEditor:
    """Changes captions of a folder, and can undo it."""

    folder: ImageFolder
    _history: list[dict[str, tuple[str, str]]] = field(default_factory=list)
    """For each edit, name -> caption before and after."""

    def preview(self, change: Change, names: Iterable[str]) -> dict[str, tuple[str, str]]:
        """Return name -> caption before and after, for each of the images that `change` would change."""
        previewed: dict[str, tuple[str, str]] = {}
        for name in names:
            before = self.folder.images[name].caption
            after = change(before).strip()
            if after != before:
                previewed[name] = (before, after)
        return previewed

    def apply(self, previewed: dict[str, tuple[str, str]]) -> EditResult:
        """Write the captions of a preview; files that changed after the preview stay as they are."""
        result = self._write(previewed)
        self.record({name: previewed[name] for name in result.changed})
        return result

    def save(self, name: str, text: str, expected: str) -> str:
        """Write a caption as `ImageFolder.save_caption` does, so that it can be undone."""
        saved = self.folder.save_caption(name, text, expected)
        self.record({name: (expected, saved)})
        return saved

    def record(self, changes: dict[str, tuple[str, str]]) -> None:
        """Remember name -> caption before and after, of changes that were made."""
        changes = {name: texts for name, texts in changes.items() if texts[0] != texts[1]}
        if changes:
            self._history = [*self._history, changes][-MAX_UNDO:]

    @property
    def undo_count(self) -> int:
        """The number of captions that `undo` would change; 0 if there is nothing to undo."""
        return len(self._history[-1]) if self._history else 0

    def undo(self) -> EditResult:
        """Write the captions that the last edit has changed as they were; those that were changed since stay."""
        if not self._history:
            return EditResult([], [])
        last = self._history.pop()
        return self._write({name: (after, before) for name, (before, after) in last.items()})

    def _write(self, changes: dict[str, tuple[str, str]]) -> EditResult:
        result = EditResult([], [])
        for name, (before, after) in changes.items():
            try:
                self.folder.save_caption(name, after, before)
            except ZImageTrainError as error:
                result.errors.append(error)
            else:
                result.changed.append(name)
        return result
