"""Shared pieces: a small config on the shipped miniature, caches that the whole session shares, no network."""

import gc
import os
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jaxtyping import install_import_hook

from typecheck import MODULES, LibrariesFirst

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

install_import_hook(MODULES, "typecheck.check")  # before anything of zimage_train is imported
sys.meta_path.insert(0, LibrariesFirst())

from zimage_train import mini
from zimage_train.config.load import validate_config
from zimage_train.config.schema import Config

from dataset_folder import image
from mini_config import mini_values
from warm_python import warm_python

ROOT = Path(__file__).parent.parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that hold slow tests, so that no worker is left with a slow test while the other idles."""
    slow_files = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow_files)


def pytest_collection_finish() -> None:
    """Exclude the imported modules from garbage collection, which otherwise takes a third of a tiny run."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def no_waiting_for_disks() -> Iterator[None]:
    """Skip the wait of `fsync`, a fifth of a tiny run: no test cuts the power, and injected faults see each call."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", os.fstat)  # fails as fsync does for a closed descriptor
        yield


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Any connection beyond this machine fails the test that makes it."""
    attempts: list[Any] = []
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        is_local = self.family == socket.AF_UNIX or str(address[0]).startswith(("127.", "::1", "localhost"))
        if not is_local:
            attempts.append(address)
            raise AssertionError(f"connection to {address}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)
    return attempts


@pytest.fixture
def quick_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of fp8 in fp32: test_fp8.py holds torch's own to them, in products and in a step."""
    from fp8_product import scaled_mm  # imports torch, which tests of other rooms do without

    monkeypatch.setattr("torch._scaled_mm", scaled_mm)


@pytest.fixture(scope="session")
def forking_python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A program to start instead of `sys.executable`, whose imports are done."""
    with warm_python(tmp_path_factory.mktemp("warm")) as program:
        yield program


@pytest.fixture(scope="module")
def warm_processes(forking_python: str) -> Iterator[None]:
    """Within a module whose tests are not about starting up, processes start with their imports done."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", forking_python)
        yield


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder for the session, so that images and prompts are encoded once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def make_config(tmp_path: Path, shared_cache: Path):
    """`make_config(train={"steps": 2})`: a checked config of a tiny run in tmp_path."""

    def make(**changes: Any) -> Config:
        config, problems = validate_config(
            mini_values(tmp_path / "runs", shared_cache, **changes), lambda path: str(path)
        )
        assert config is not None, problems
        return config

    return make


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A copy of the miniature to break."""
    return Path(shutil.copytree(mini.TURBO, tmp_path / "model"))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three images with captions, the last image in a subfolder."""
    root = tmp_path / "photos"
    for number, name in enumerate(("b.png", "a.jpg", "sub/c.webp")):
        path = image(root / name, (number, 20, 30), (80 + 16 * number, 64))
        path.with_suffix(".txt").write_text(f"caption {path.stem}")
    return root
