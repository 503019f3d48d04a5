"""The `doctor` command: whether this machine can train, what is in the way, and what to do about it.

What is found out and what is made of it are apart, so that every verdict can be tried without the machine.
"""

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from zimage_train.config.variants import DOWNLOAD_GB
from zimage_train.errors import DiskError
from zimage_train.io import locks
from zimage_train.io.operating_system import main_memory_bytes
from zimage_train.io.units import format_bytes
from zimage_train.planning.gpus import find_gpu

Level = Literal["ok", "note", "bad"]
OLDEST_CAPABILITY, FP8_CAPABILITY = (8, 0), (8, 9)
LEAST_RAM_GB = 16
HUB_VARIABLES = (
    *("ZIMAGE_TRAIN_HUB", "HF_HOME", "HF_HUB_CACHE", "HF_ENDPOINT", "HF_HUB_OFFLINE"),
    *("MODELSCOPE_CACHE", "MODELSCOPE_ENDPOINT", "HTTPS_PROXY", "HTTP_PROXY"),
)


@dataclass(frozen=True)
class DoctorFinding:
    """One line: how bad it is, what was found, what to do."""

    level: Level
    what: str
    todo: str = ""

    def __str__(self) -> str:
        return f"{self.level:4}  {self.what}" + (f"; {self.todo}" if self.todo else "")


@dataclass(frozen=True)
class GpuFacts:
    """A card, as torch and the driver see it."""

    name: str
    memory_bytes: int
    free_bytes: int
    capability: tuple[int, int]
    has_bf16: bool
    is_compiled_for: bool
    """Whether this torch has code for it."""


@dataclass(frozen=True)
class SystemFacts:
    """What was found out."""

    system: str
    """Linux, WSL, Windows or macOS."""
    machine: str
    python: tuple[int, int]
    packages: dict[str, tuple[str | None, str]]
    """Name -> version that is installed, and what is required."""
    torch_cuda: str | None
    """The CUDA that torch was built for."""
    driver: str | None
    """Of NVIDIA's driver."""
    driver_sees: str | None
    """The card that the driver sees."""
    gpus: list[GpuFacts]
    ram_bytes: int
    free_bytes: dict[str, int]
    """Place -> free space."""
    locks: bool
    """Whether a second process would be kept out of a run's folder here."""
    downloaded: dict[str, bool]
    """Repository -> whether all of it is here."""
    cache: str
    """Where the hub's files are kept: one of the places above."""
    cache_variable: str
    """What moves it."""
    environment: dict[str, str] = field(default_factory=dict)


def diagnose(facts: SystemFacts) -> Iterator[DoctorFinding]:
    """What to make of `facts`."""
    yield _platform(facts)
    yield from _packages(facts)
    yield from _torch(facts)
    for gpu in facts.gpus:
        yield from _gpu(gpu, facts)
    yield from _memory_and_disk(facts)
    yield from _hub(facts)


def _platform(facts: SystemFacts) -> DoctorFinding:
    where = f"{facts.system} on {facts.machine}, Python {'.'.join(map(str, facts.python))}"
    if facts.python < (3, 11):
        return DoctorFinding("bad", where, "Python 3.11 or newer is needed")
    if facts.system in ("Linux", "WSL"):
        return DoctorFinding("ok", where)
    todo = "WSL 2 is Linux" if facts.system == "Windows" else "the miniature and drawing are what it is meant for"
    return DoctorFinding("note", f"{where}: nobody has tried this system yet", todo)


def _packages(facts: SystemFacts) -> Iterator[DoctorFinding]:
    wrong = {name: one for name, one in facts.packages.items() if not _meets(*one)}
    for name, (version, required) in wrong.items():
        what = f"{name} {version}, and {required} is required" if version else f"{name} is not installed"
        yield DoctorFinding("bad", what, f"pip install '{name}{required}'")
    if not wrong:
        yield DoctorFinding("ok", f"{len(facts.packages)} packages are there in versions that are known to work")


def _torch(facts: SystemFacts) -> Iterator[DoctorFinding]:
    if facts.system == "macOS":
        return
    if facts.driver is None and not facts.gpus:
        todo = "rent one, or try everything on the miniature: zimage-train init FOLDER --miniature"
        yield DoctorFinding("note", "no NVIDIA card, or no driver for it: the 6 B model cannot be trained here", todo)
    elif facts.torch_cuda is None:
        todo = "install torch from https://pytorch.org/get-started/locally with CUDA chosen"
        yield DoctorFinding("bad", f"the driver sees {facts.driver_sees}, but this torch is built without CUDA", todo)
    elif not facts.gpus:
        todo = (
            "update the driver (nvidia-smi shows the newest CUDA that it takes), or install a torch for an older CUDA"
        )
        what = f"torch for CUDA {facts.torch_cuda} cannot use the card with driver {facts.driver}"
        yield DoctorFinding("bad", what, todo)
    else:
        yield DoctorFinding("ok", f"torch for CUDA {facts.torch_cuda}, driver {facts.driver}")


def _gpu(gpu: GpuFacts, facts: SystemFacts) -> Iterator[DoctorFinding]:
    size = format_bytes(gpu.memory_bytes)
    if gpu.capability < OLDEST_CAPABILITY or not gpu.has_bf16:
        yield DoctorFinding("bad", f"{gpu.name} ({size}) has no bf16", "an RTX 30 series card or newer is needed")
        return
    if not gpu.is_compiled_for:
        sm = f"sm_{gpu.capability[0]}{gpu.capability[1]}"
        todo = "install a newer torch: RTX 50 cards need one for CUDA 12.8 or later"
        yield DoctorFinding("bad", f"this torch has no code for {gpu.name} ({sm})", todo)
        return
    fp8 = "" if gpu.capability >= FP8_CAPABILITY else "; fp8 weights are only stored so, which saves memory and no time"
    known = find_gpu(gpu.name)
    speed = "" if known else "; its speed is not in our list, so times are known after a first run"
    yield DoctorFinding("ok", f"{gpu.name}, {size}, bf16{fp8}{speed}")
    used = gpu.memory_bytes - gpu.free_bytes
    if used > max(1.5e9, 0.1 * gpu.memory_bytes):
        todo = "close what uses it, or set memory.budget_gb lower"
        yield DoctorFinding("note", f"{format_bytes(used)} of {gpu.name} are in use by others", todo)
    if facts.system in ("Windows", "WSL"):
        todo = "set CUDA - Sysmem Fallback Policy to Prefer No Sysmem Fallback in NVIDIA's control panel"
        yield DoctorFinding("note", "here the driver may spill into main memory, which is ten times as slow", todo)
    if gpu.memory_bytes < 7.5e9:
        yield DoctorFinding("bad", f"{size} are too little", "8 GB are the least that plans are made for")


def _memory_and_disk(facts: SystemFacts) -> Iterator[DoctorFinding]:
    if facts.ram_bytes < LEAST_RAM_GB * 0.93e9:
        todo = f"{LEAST_RAM_GB} GB let every plan work: streamed blocks wait there"
        yield DoctorFinding("note", f"{format_bytes(facts.ram_bytes)} of main memory", todo)
    else:
        yield DoctorFinding("ok", f"{format_bytes(facts.ram_bytes)} of main memory")
    needed = 1e9 * sum(DOWNLOAD_GB.values()) if not all(facts.downloaded.values()) else 0.0
    for place, free in facts.free_bytes.items():
        if place == facts.cache and free < needed:
            what = f"{format_bytes(free)} free in {place}, and the weights take {format_bytes(needed)}"
            yield DoctorFinding("bad", what, f"free some space, or set {facts.cache_variable} to another disk")
        elif free < 5e9:
            yield DoctorFinding("note", f"{format_bytes(free)} free in {place}", "checkpoints and caches want some GB")
        else:
            yield DoctorFinding("ok", f"{format_bytes(free)} free in {place}")
    if not facts.locks:
        todo = "two runs in one folder are told apart by a lease of two minutes"
        yield DoctorFinding("note", "this disk has no file locks (some network volumes)", todo)


def _hub(facts: SystemFacts) -> Iterator[DoctorFinding]:
    for repository, is_here in facts.downloaded.items():
        if is_here:
            yield DoctorFinding("ok", f"{repository} is on this machine")
        else:
            yield DoctorFinding(
                "note",
                f"{repository} is not on this machine",
                "zimage-train download turbo, or the first training does it",
            )
    for name, value in facts.environment.items():
        yield DoctorFinding("note", f"{name} is set to {value}")


def _meets(version: str | None, required: str) -> bool:
    minimum = re.search(r">=\s*([\d.]+)", required)
    if version is None:
        return False
    return minimum is None or _numbers(version) >= _numbers(minimum[1])


def _numbers(version: str) -> list[int]:
    release = re.match(r"[\d.]+", version)
    return [int(part) for part in (release[0] if release else "0").split(".") if part]


def gather_facts() -> SystemFacts:
    """Find it all out; nothing is downloaded, and nobody on the network is asked."""
    import torch

    from zimage_train.config.variants import ADAPTERS, VARIANTS
    from zimage_train.models import locate
    from zimage_train.models.hub import client

    driver, driver_sees = _driver()
    adapter, turbo = "/".join(ADAPTERS["v2"].split("/")[:2]), VARIANTS["turbo"].transformer
    parts = ["transformer/*.safetensors", "text_encoder/*.safetensors", "tokenizer/*", "vae/*.safetensors"]
    wanted = {turbo: parts, adapter: [ADAPTERS["v2"].split("/")[2]]}
    return SystemFacts(
        system=_system(),
        machine=platform.machine(),
        python=sys.version_info[:2],
        packages=_installed(),
        torch_cuda=torch.version.cuda,
        driver=driver,
        driver_sees=driver_sees,
        gpus=[_seen(index) for index in range(torch.cuda.device_count())],
        ram_bytes=main_memory_bytes(),
        free_bytes=_free(Path.cwd(), client.selected_hub().cache_folder()),
        locks=_locks(),
        downloaded={name: locate.is_here(name, patterns) for name, patterns in wanted.items()},
        cache=str(client.selected_hub().cache_folder()),
        cache_variable=client.selected_hub().CACHE_VARIABLE,
        environment={name: os.environ[name] for name in HUB_VARIABLES if os.environ.get(name)},
    )


def _system() -> str:
    if sys.platform == "win32":
        return "Windows"
    if sys.platform == "darwin":
        return "macOS"
    return "WSL" if "microsoft" in platform.release().lower() else "Linux"


def _installed() -> dict[str, tuple[str | None, str]]:
    found: dict[str, tuple[str | None, str]] = {}
    for line in importlib.metadata.requires("zimage-train") or []:
        requirement, _, marker = line.partition(";")
        match = re.match(r"[\w.-]+", requirement)
        if match is None or "extra ==" in marker or (sys.platform == "darwin" and "sys_platform" in marker):
            continue
        try:
            version = importlib.metadata.version(match[0])
        except importlib.metadata.PackageNotFoundError:
            version = None
        found[match[0]] = version, requirement[match.end() :].strip()
    return found


def _driver() -> tuple[str | None, str | None]:
    if shutil.which("nvidia-smi") is None:
        return None, None
    command = ["nvidia-smi", "--query-gpu=driver_version,name", "--format=csv,noheader"]
    try:
        line = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None, None
    version, _, name = line.partition(",")
    return version.strip(), name.strip()


def _seen(index: int) -> GpuFacts:
    import torch

    properties = torch.cuda.get_device_properties(index)
    capability = (properties.major, properties.minor)
    codes = torch.cuda.get_arch_list()
    majors = {code.split("_")[1][:-1] for code in codes if code.startswith(("sm_", "compute_"))}
    return GpuFacts(
        name=properties.name,
        memory_bytes=properties.total_memory,
        free_bytes=torch.cuda.mem_get_info(index)[0],
        capability=capability,
        has_bf16=torch.cuda.is_bf16_supported(False),
        is_compiled_for=str(properties.major) in majors,
    )


def _free(*places: Path) -> dict[str, int]:
    existing = {place: next(one for one in (place, *place.parents) if one.exists()) for place in places}
    return {str(place): shutil.disk_usage(path).free for place, path in existing.items()}


def _locks() -> bool:
    """Whether the system locks a run's folder here against a second process."""
    try:
        with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
            return locks.has_system_locks(Path(name))
    except (DiskError, OSError):
        return False


def doctor_report(facts: SystemFacts) -> tuple[list[str], bool]:
    """All findings as lines, and whether the 6 B model can be trained here."""
    found = list(diagnose(facts))
    bad = [one for one in found if one.level == "bad"]
    can_train = not bad and bool(facts.gpus)
    verdict = "this machine can train Z-Image" if can_train else "the 6 B model cannot be trained here; see above"
    most = max((gpu.memory_bytes for gpu in facts.gpus), default=0)
    plan = f" ({format_bytes(most)}: docs/memory.md says how it fits)" if can_train else ""
    return [*map(str, found), "", verdict + plan], can_train
