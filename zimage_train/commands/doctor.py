"""The `doctor` command: check whether this machine can train, and say what to fix.

Facts about the machine are gathered apart from the findings that follow from them, so that every finding can be tested
without such a machine.
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
from zimage_train.planning.gpus import FP8_CAPABILITY, find_gpu

Level = Literal["ok", "note", "bad"]
MIN_CAPABILITY = (8, 0)
MIN_RAM_GB = 16
HUB_VARIABLES = (
    *("ZIMAGE_TRAIN_HUB", "HF_HOME", "HF_HUB_CACHE", "HF_ENDPOINT", "HF_HUB_OFFLINE"),
    *("MODELSCOPE_CACHE", "MODELSCOPE_ENDPOINT", "HTTPS_PROXY", "HTTP_PROXY"),
)


@dataclass(frozen=True)
class DoctorFinding:
    """A line of the report."""

    level: Level
    message: str
    hint: str = ""

    def __str__(self) -> str:
        return f"{self.level:4}  {self.message}" + (f"; {self.hint}" if self.hint else "")


@dataclass(frozen=True)
class GpuFacts:
    """A GPU, as torch and the driver see it."""

    name: str
    memory_bytes: int
    free_bytes: int
    capability: tuple[int, int]
    has_bf16: bool
    is_compiled_for: bool
    """Whether this torch contains code for the GPU."""


@dataclass(frozen=True)
class SystemFacts:
    """Facts about the machine and its software."""

    system: str
    """Linux, WSL, Windows or macOS."""
    machine: str
    """Architecture of the CPU."""
    python: tuple[int, int]
    packages: dict[str, tuple[str | None, str]]
    """Name -> installed version or None, and the required versions such as `>=2.7`."""
    torch_cuda: str | None
    """CUDA version that torch was built for."""
    driver: str | None
    """Version of NVIDIA's driver."""
    driver_gpu: str | None
    """Name of the first GPU that the driver lists."""
    gpus: list[GpuFacts]
    ram_bytes: int
    free_bytes: dict[str, int]
    """Folder -> free space on its disk."""
    has_locks: bool
    """Whether the file system of the working directory has locks."""
    downloaded: dict[str, bool]
    """Repository -> whether all needed files of it are on this machine."""
    hub_cache: str
    """Folder of downloaded files; a key of `free_bytes`."""
    hub_cache_variable: str
    """Environment variable that moves it."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables of `HUB_VARIABLES` that are set."""


def diagnose(facts: SystemFacts) -> Iterator[DoctorFinding]:
    """Yield the findings that follow from `facts`, in the order of the report."""
    yield _platform(facts)
    yield from _packages(facts)
    yield from _torch(facts)
    for gpu in facts.gpus:
        yield from _gpu(gpu, facts)
    yield from _memory_and_disk(facts)
    yield from _hub(facts)


def _platform(facts: SystemFacts) -> DoctorFinding:
    version = ".".join(map(str, facts.python))
    message = f"{facts.system} on {facts.machine}, Python {version}"
    if facts.python < (3, 11):
        return DoctorFinding("bad", message, "Python 3.11 or newer is needed")
    if facts.system in ("Linux", "WSL"):
        return DoctorFinding("ok", message)
    hint = "WSL 2 is safer" if facts.system == "Windows" else "it is meant for the miniature and for drawing"
    return DoctorFinding("note", f"{message}: this system is untested", hint)


def _packages(facts: SystemFacts) -> Iterator[DoctorFinding]:
    unsuitable = {}
    for name, (version, required) in facts.packages.items():
        if not _meets(version, required):
            unsuitable[name] = version, required
    for name, (version, required) in unsuitable.items():
        message = f"{name} {version}, and {required} is required" if version else f"{name} is not installed"
        yield DoctorFinding("bad", message, f"pip install '{name}{required}'")
    if not unsuitable:
        yield DoctorFinding("ok", f"{len(facts.packages)} required packages are installed in suitable versions")


def _torch(facts: SystemFacts) -> Iterator[DoctorFinding]:
    if facts.system == "macOS":
        return
    if facts.driver is None and not facts.gpus:
        message = "no NVIDIA GPU, or no driver for it: the 6 B model cannot be trained here"
        hint = "rent a GPU, or try everything on the miniature: zimage-train init FOLDER --miniature"
        yield DoctorFinding("note", message, hint)
    elif facts.torch_cuda is None:
        message = f"the driver lists {facts.driver_gpu}, but this torch is built without CUDA"
        hint = "install torch from https://pytorch.org/get-started/locally with CUDA chosen"
        yield DoctorFinding("bad", message, hint)
    elif not facts.gpus:
        message = f"torch for CUDA {facts.torch_cuda} cannot use the GPU with driver {facts.driver}"
        hint = "update the driver, or install torch for an older CUDA (nvidia-smi shows the newest that the driver has)"
        yield DoctorFinding("bad", message, hint)
    else:
        yield DoctorFinding("ok", f"torch for CUDA {facts.torch_cuda}, driver {facts.driver}")


def _gpu(gpu: GpuFacts, facts: SystemFacts) -> Iterator[DoctorFinding]:
    size = format_bytes(gpu.memory_bytes)
    if gpu.capability < MIN_CAPABILITY or not gpu.has_bf16:
        yield DoctorFinding("bad", f"{gpu.name} ({size}) has no bf16", "an RTX 30 series GPU or newer is needed")
        return
    if not gpu.is_compiled_for:
        message = f"this torch is not compiled for {gpu.name} (sm_{gpu.capability[0]}{gpu.capability[1]})"
        yield DoctorFinding("bad", message, "install a newer torch: RTX 50 GPUs need a build for CUDA 12.8 or later")
        return
    message = f"{gpu.name}, {size}, bf16"
    if gpu.capability < FP8_CAPABILITY:
        message += "; without fp8 arithmetic (model.quantize: fp8_fast)"
    if find_gpu(gpu.name) is None:
        message += "; its speed is not known, so times are predicted after a first run only"
    yield DoctorFinding("ok", message)
    used = gpu.memory_bytes - gpu.free_bytes
    if used > max(1.5e9, 0.1 * gpu.memory_bytes):
        message = f"{format_bytes(used)} of {gpu.name} are in use by other programs"
        yield DoctorFinding("note", message, "close them, or lower memory.budget_gb")
    if facts.system in ("Windows", "WSL"):
        message = "when the GPU's memory is full, the driver may use main memory, which is ten times slower"
        hint = "set CUDA - Sysmem Fallback Policy to Prefer No Sysmem Fallback in NVIDIA's control panel"
        yield DoctorFinding("note", message, hint)
    if gpu.memory_bytes < 7.5e9:
        yield DoctorFinding("bad", f"{size} of GPU memory are too little", "at least 8 GB are needed")


def _memory_and_disk(facts: SystemFacts) -> Iterator[DoctorFinding]:
    ram = f"{format_bytes(facts.ram_bytes)} of main memory"
    if facts.ram_bytes < MIN_RAM_GB * 0.93e9:  # systems report a little less than is built in
        yield DoctorFinding("note", ram, f"{MIN_RAM_GB} GB are enough for all plans, some of which keep blocks there")
    else:
        yield DoctorFinding("ok", ram)
    download_bytes = 0.0
    if not all(facts.downloaded.values()):
        download_bytes = 1e9 * sum(DOWNLOAD_GB.values())
    for folder, free_bytes in facts.free_bytes.items():
        message = f"{format_bytes(free_bytes)} free in {folder}"
        if folder == facts.hub_cache and free_bytes < download_bytes:
            message += f", and the weights take {format_bytes(download_bytes)}"
            yield DoctorFinding("bad", message, f"free some space, or set {facts.hub_cache_variable} to another disk")
        elif free_bytes < 5e9:
            yield DoctorFinding("note", message, "checkpoints and caches need some GB")
        else:
            yield DoctorFinding("ok", message)
    if not facts.has_locks:
        message = "this disk has no file locks, like some network volumes"
        yield DoctorFinding("note", message, "a lease of two minutes keeps a second run out of a folder instead")


def _hub(facts: SystemFacts) -> Iterator[DoctorFinding]:
    for repository, is_downloaded in facts.downloaded.items():
        if is_downloaded:
            yield DoctorFinding("ok", f"{repository} is on this machine")
        else:
            hint = "zimage-train download turbo fetches it, or else the first training"
            yield DoctorFinding("note", f"{repository} is not on this machine", hint)
    for name, value in facts.environment.items():
        yield DoctorFinding("note", f"{name} is set to {value}")


def _meets(version: str | None, required: str) -> bool:
    """Return whether a version is installed and at least the minimum in `required`, such as `>=2.7`."""
    minimum = re.search(r">=\s*([\d.]+)", required)
    if version is None:
        return False
    return minimum is None or _version_numbers(version) >= _version_numbers(minimum[1])


def _version_numbers(version: str) -> list[int]:
    """Return the release as numbers: [2, 13, 0] for 2.13.0+cu130."""
    release = re.match(r"[\d.]+", version)
    return [int(part) for part in (release[0] if release else "0").split(".") if part]


def gather_facts() -> SystemFacts:
    """Return the facts about this machine, without any network request."""
    import torch

    from zimage_train.config.variants import ADAPTERS, VARIANTS
    from zimage_train.models import locate
    from zimage_train.models.hub import client

    driver, driver_gpu = _query_driver()
    owner, name, adapter_file = ADAPTERS["v2"].split("/")
    model_files = ["transformer/*.safetensors", "text_encoder/*.safetensors", "tokenizer/*", "vae/*.safetensors"]
    files_by_repository = {VARIANTS["turbo"].transformer: model_files, f"{owner}/{name}": [adapter_file]}
    hub = client.selected_hub()
    return SystemFacts(
        system=_system(),
        machine=platform.machine(),
        python=sys.version_info[:2],
        packages=_required_packages(),
        torch_cuda=torch.version.cuda,
        driver=driver,
        driver_gpu=driver_gpu,
        gpus=[_gpu_facts(index) for index in range(torch.cuda.device_count())],
        ram_bytes=main_memory_bytes(),
        free_bytes=_free_bytes(Path.cwd(), hub.cache_folder()),
        has_locks=_has_locks(),
        downloaded={repository: locate.is_here(repository, files) for repository, files in files_by_repository.items()},
        hub_cache=str(hub.cache_folder()),
        hub_cache_variable=hub.CACHE_VARIABLE,
        environment={name: os.environ[name] for name in HUB_VARIABLES if os.environ.get(name)},
    )


def _system() -> str:
    if sys.platform == "win32":
        return "Windows"
    if sys.platform == "darwin":
        return "macOS"
    return "WSL" if "microsoft" in platform.release().lower() else "Linux"


def _required_packages() -> dict[str, tuple[str | None, str]]:
    """Return the requirements of this package as in `SystemFacts.packages`, without extras."""
    packages: dict[str, tuple[str | None, str]] = {}
    for line in importlib.metadata.requires("zimage-train") or []:
        requirement, _, marker = line.partition(";")
        name = re.match(r"[\w.-]+", requirement)
        # The only marker of a platform excludes macOS.
        if name is None or "extra ==" in marker or (sys.platform == "darwin" and "sys_platform" in marker):
            continue
        try:
            version = importlib.metadata.version(name[0])
        except importlib.metadata.PackageNotFoundError:
            version = None
        packages[name[0]] = version, requirement[name.end() :].strip()
    return packages


def _query_driver() -> tuple[str | None, str | None]:
    """Return the driver's version and the name of the first GPU, or (None, None) if nvidia-smi does not say."""
    if shutil.which("nvidia-smi") is None:
        return None, None
    command = ["nvidia-smi", "--query-gpu=driver_version,name", "--format=csv,noheader"]
    try:
        line = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None, None
    version, _, name = line.partition(",")
    return version.strip(), name.strip()


def _gpu_facts(index: int) -> GpuFacts:
    import torch

    properties = torch.cuda.get_device_properties(index)
    # Code for sm_80 runs on every GPU of capability 8.x, so the major number decides.
    compiled_majors = set()
    for architecture in torch.cuda.get_arch_list():
        if architecture.startswith(("sm_", "compute_")):
            compiled_majors.add(architecture.split("_")[1][:-1])
    return GpuFacts(
        name=properties.name,
        memory_bytes=properties.total_memory,
        free_bytes=torch.cuda.mem_get_info(index)[0],
        capability=(properties.major, properties.minor),
        has_bf16=torch.cuda.is_bf16_supported(False),
        is_compiled_for=str(properties.major) in compiled_majors,
    )


def _free_bytes(*folders: Path) -> dict[str, int]:
    """Return the free space of each folder, as that of its nearest parent that exists."""
    free_bytes = {}
    for folder in folders:
        for existing in (folder, *folder.parents):
            if existing.exists():
                free_bytes[str(folder)] = shutil.disk_usage(existing).free
                break
    return free_bytes


def _has_locks() -> bool:
    """Return whether the working directory can be written to and has file locks."""
    try:
        with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
            return locks.has_system_locks(Path(name))
    except (DiskError, OSError):
        return False


def doctor_report(facts: SystemFacts) -> tuple[list[str], bool]:
    """Return all findings as lines, and whether the 6 B model can be trained here."""
    findings = list(diagnose(facts))
    can_train = bool(facts.gpus) and all(finding.level != "bad" for finding in findings)
    if can_train:
        memory = format_bytes(max(gpu.memory_bytes for gpu in facts.gpus))
        verdict = f"this machine can train Z-Image ({memory}: docs/memory.md says how it fits)"
    else:
        verdict = "the 6 B model cannot be trained here; see above"
    return [*map(str, findings), "", verdict], can_train
