"""Lists of images in a file: a .jsonl or .csv with a column of images and one of prompts."""

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zimage_train.config.dataset import DataEntry
from zimage_train.dataset import captions
from zimage_train.errors import DataError, Location, Problem, ZImageTrainError

IMAGE_COLUMNS = ("image", "file_name")
PROMPT_COLUMNS = ("prompt", "text", "caption")
SURPLUS_COLUMN = "(surplus)"
"""The column of what a row of a CSV has beyond its header."""


@dataclass(frozen=True)
class Source:
    """An image that is named, before it is looked at: its file, its captions and how often it is seen."""

    path: Path
    captions: tuple[str, ...]
    repeats: int = 1


def read_metadata(entry: DataEntry, errors: list[ZImageTrainError]) -> list[Source]:
    """The images that the file `entry.metadata` lists; what is wrong with one of its lines goes into `errors`.

    Raises:
        DataError: it cannot be read as a whole, or has no prompts.
    """
    path = Path(entry.metadata or "")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise DataError(Problem(str(path), "does not exist", "check data.metadata", "missing-file")) from None
    except UnicodeDecodeError:
        raise DataError(Problem(str(path), "is not UTF-8", "save it as UTF-8", "not-text")) from None
    except OSError as error:
        what = f"cannot be read ({error.strerror})"
        raise DataError(Problem(str(path), what, "check data.metadata", "unreadable-file")) from None
    sources = []
    columns: set[str] = set()
    for line, row in _rows(path, text, errors):
        place = Location(str(path), line)
        columns |= row.keys()
        if SURPLUS_COLUMN in row:
            what = f"has {len(row) - 1 + len(row[SURPLUS_COLUMN])} columns where the header has {len(row) - 1}"
            todo = 'put texts that hold a comma in "quotes"'
            errors.append(DataError(Problem(place, what, todo, "bad-row")))
            continue
        image = next((row[name] for name in IMAGE_COLUMNS if row.get(name)), None)
        prompt = next((row[name] for name in PROMPT_COLUMNS if row.get(name)), "")
        prompts = prompt if isinstance(prompt, list) else [prompt]
        if not isinstance(image, str) or not all(isinstance(one, str) for one in prompts):
            name, wanted = ("prompt", PROMPT_COLUMNS) if isinstance(image, str) else ("image", IMAGE_COLUMNS)
            what = f"has no text in {' or '.join(wanted)}; its columns are {', '.join(row) or 'nothing'}"
            errors.append(DataError(Problem(place, what, f"give {name} as text", "bad-row")))
        elif not is_text(image + "".join(prompts)):
            what = "holds a character that no text has (NUL or half a surrogate pair)"
            errors.append(DataError(Problem(place, what, "correct the line", "not-text")))
        else:
            texts = tuple(captions.clean_text(one) for one in prompts)
            sources.append(Source(path.parent / image, texts, int(entry.repeats)))
    if sources and not columns & set(PROMPT_COLUMNS) and not entry.default_caption:
        what = f"has no column {', '.join(PROMPT_COLUMNS)}; its columns are {', '.join(sorted(columns))}"
        raise DataError(Problem(str(path), what, "add the prompts, or set default_caption", "missing-column"))
    return sources


def _rows(path: Path, text: str, errors: list[ZImageTrainError]) -> Iterator[tuple[int, dict[str, Any]]]:
    if path.suffix.lower() == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""), restkey=SURPLUS_COLUMN)
        try:
            header = (reader.fieldnames or [""])[0]
            if other := next((sign for sign in ";\t|" if sign in header), None):
                what, todo = f"is separated by {other!r}", "separate its columns by commas"
                raise DataError(Problem(str(path), what, todo, "bad-table"))
            for row in reader:
                yield reader.line_num, row
        except csv.Error as error:
            place = Location(str(path), reader.line_num + 1)
            errors.append(DataError(Problem(place, f"is not CSV ({error})", "correct the line", "bad-row")))
        return
    if path.suffix.lower() != ".jsonl":
        raise DataError(Problem(str(path), "is neither .jsonl nor .csv", "convert it", "bad-table"))
    for line, content in enumerate(text.split("\n"), 1):  # not splitlines, which cuts at U+2028 inside a prompt too
        if not content.strip():
            continue
        try:
            row = json.loads(content)
        except (ValueError, RecursionError) as error:
            place = Location(str(path), line)
            errors.append(DataError(Problem(place, f"is not JSON ({error})", "correct the line", "bad-row")))
            continue
        yield line, row if isinstance(row, dict) else {}


def is_text(text: str) -> bool:
    """Whether every character of `text` is one that a text can have."""
    return not any(letter == "\0" or "\ud800" <= letter <= "\udfff" for letter in text)
