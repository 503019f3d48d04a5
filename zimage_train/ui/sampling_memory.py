"""The memory that an image needs, and the runs that train beside it (torch-free)."""

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from zimage_train.errors import ZImageTrainError
from zimage_train.io.safetensors_format import read_header
from zimage_train.models import locate
from zimage_train.models.locate import NotDownloadedError
from zimage_train.planning import memory
from zimage_train.planning.memory import WeightPlacement
from zimage_train.planning.workload import Workload
from zimage_train.ui.jobs import JobQueue
from zimage_train.ui.machine import MachineState
from zimage_train.ui.sample_request import Drawing


@dataclass(frozen=True)
class MemoryNeeds:
    """The memory of an image beside what the machine has."""

    needed_bytes: int | None
    """Predicted peak with the whole model on the device; None while its files are not known."""
    free_bytes: int | None
    """Bytes that are free there now."""
    training: tuple[str, ...]
    """The runs that train on the same device."""
    is_downloaded: bool
    """Whether the model is on this machine."""

    @property
    def is_tight(self) -> bool:
        """Whether more is needed than is free."""
        return self.needed_bytes is not None and self.free_bytes is not None and self.needed_bytes > self.free_bytes


def sampling_slot(queue: JobQueue) -> str:
    """Return the GPU that images are drawn on, "cpu" without one: the last that trains nothing, or else the last."""
    busy = queue.busy()
    free = [slot for slot in queue.slots if slot not in busy]
    return (free or queue.slots)[-1]


def memory_needs(drawing: Drawing, queue: JobQueue, machine: MachineState, slot: str) -> MemoryNeeds:
    """Return the memory that `drawing` needs and the free memory of the GPU `slot` or, without one, of the machine."""
    busy = queue.busy()
    training = (busy[slot],) if slot in busy else ()
    free: float | None = machine.free_memory_bytes
    for gpu in machine.gpus:
        if gpu.index == slot:
            free = None if gpu.total_bytes is None or gpu.used_bytes is None else gpu.total_bytes - gpu.used_bytes
    free_bytes = None if free is None else int(free)
    try:
        needed = needed_bytes(drawing, is_gpu=slot != "cpu")
    except NotDownloadedError:
        return MemoryNeeds(None, free_bytes, training, is_downloaded=False)
    except ZImageTrainError:  # the worker will say what is wrong with the files
        return MemoryNeeds(None, free_bytes, training, is_downloaded=True)
    return MemoryNeeds(needed, free_bytes, training, is_downloaded=True)


def needed_bytes(drawing: Drawing, is_gpu: bool) -> int:
    """Return the predicted peak of an image, by the sizes in the headers of the files.

    Raises:
        WeightsError: a file is missing, or is not what it should be.
    """
    settings = drawing.settings
    shape, _ = locate.transformer_tensors(locate.locate(settings, locate.cached_only).transformer)
    workload = Workload(
        shape=shape,
        dtype=settings.dtype,
        trained=sum(_numbers_in(Path(file)) for file, _ in drawing.loras),
        optimizer="adamw8bit",
        sizes=Counter(),
        batch_size=1,
        caption_tokens=0,
        previews=(drawing.sampling,),
        gpu=is_gpu,
    )
    quantization = None if settings.quantize == "auto" else settings.quantize
    return memory.preview_memory(workload, WeightPlacement(quantization)).total


def _numbers_in(path: Path) -> int:
    header = read_header(path)
    return sum(math.prod(tensor.shape) for tensor in header.tensors.values())
