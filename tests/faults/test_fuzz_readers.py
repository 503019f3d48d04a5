"""Every reader of a file that a user or a stranger may give, with bytes made to break it.

A result, or a declared error with a message, within seconds and 200 MB; never a traceback. The cases are the same in
every run; `FUZZ_CASES=20000 pytest tests/faults/test_fuzz_readers.py -k lora` draws as many at random.
"""

import traceback
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zimage_train.errors import WeightsError
from zimage_train.training import checkpoint

from fuzzed_tensors import IMAGES, TENSOR_FILES
from fuzzed_texts import CONFIGS, RECORDS
from fuzzing import CORPUS, FileReader, Hang, Seeds, answer, few_edits, fuzzed, mutated

READERS = {reader.name: reader for reader in (*CONFIGS, *RECORDS, *IMAGES, *TENSOR_FILES)}
KILOBYTE = 1024
NO_CORPUS = {"checkpoint", "cache_entry", "weights_header"}
"""Readers without a folder of their own."""


@pytest.fixture(scope="module", params=list(READERS))
def reader(request: pytest.FixtureRequest) -> FileReader:
    return READERS[request.param]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose `seeds` hold what the seeds are made of."""
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "seeds").mkdir()
    return folder


@pytest.fixture(scope="module")
def path(reader: FileReader, root: Path, seeds: Seeds) -> Path:
    """Where the file of a case is; what it is beside, such as a run, is made with the seeds, and not within a case."""
    folder = root / reader.name
    folder.mkdir(exist_ok=True)
    return folder / reader.file


@pytest.fixture(scope="module")
def seeds(reader: FileReader, root: Path) -> Seeds:
    return Seeds(reader.seeds(root / "seeds"))


def test_the_seeds_are_accepted(reader: FileReader, path: Path, seeds: Seeds):
    """The files that are damaged below are valid, so that damage reaches what comes after the first check."""
    assert seeds and [answer(reader, path, seed) for seed in seeds] == [None] * len(seeds)


def test_the_corpus_is_answered(reader: FileReader, path: Path):
    """Files that once broke a reader, or were written to."""
    failures: list[str] = []
    for file in reader.corpus():
        try:
            answer(reader, path, file.read_bytes())
        except (Exception, Hang) as error:
            traceback.print_exc()
            failures.append(f"{file.parent.name}/{file.name}: {type(error).__name__}: {str(error)[:200]}")
    assert not failures, "\n".join(failures)


@fuzzed(15)
@given(content=st.binary(max_size=KILOBYTE))
def test_any_bytes_are_answered(reader: FileReader, path: Path, content: bytes):
    answer(reader, path, content)


@fuzzed(40)
@given(number=st.integers(0, 99), changes=few_edits())
def test_damaged_files_are_answered(reader: FileReader, path: Path, seeds: Seeds, number: int, changes):
    answer(reader, path, mutated(seeds[number % len(seeds)], changes))


def test_no_folder_is_left_out():
    assert {folder.name for folder in CORPUS.iterdir()} == {
        *(reader.container for reader in READERS.values() if reader.container),
        *READERS.keys() - NO_CORPUS,
    }


def test_each_changed_byte_is_detected(root: Path):
    """Any change of any one byte of a checkpoint is detected, and its loss as well."""
    reader = READERS["checkpoint"]
    (content,) = reader.seeds(root / "seeds")
    path = root / "changed.safetensors"
    for place in range(len(content)):
        for value in {0, 32, 255, content[place] ^ 1, content[place] ^ 128} - {content[place]}:
            path.write_bytes(content[:place] + bytes([value]) + content[place + 1 :])
            with pytest.raises(WeightsError):
                checkpoint.load(path)
        path.write_bytes(content[:place] + content[place + 1 :])
        with pytest.raises(WeightsError):
            checkpoint.load(path)
