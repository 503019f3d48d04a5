"""The answers of the API as pydantic models, from which `/openapi.json` is made."""

from typing import Any

from pydantic import BaseModel, Field

from zimage_train.ui.sample_request import SampleRequest
from zimage_train.ui.sampling import SampleStatus


class ProblemValues(BaseModel):
    """A problem and its remedy."""

    where: str
    found: str
    todo: str
    code: str = ""


class Problems(BaseModel):
    """Why a request was refused."""

    problems: list[ProblemValues]


class MemoryState(BaseModel):
    """The predicted memory of an image, with the whole model on the device."""

    needed_gb: float | None = Field(description="null: the model is not on this machine yet.")
    free_gb: float | None = Field(description="Free on the GPU, or in main memory without one.")
    training: list[str] = Field(description="The runs that train on the same device.")
    is_downloaded: bool = Field(description="Whether the model is on this machine; if not, it is downloaded first.")


class SampleState(BaseModel):
    """An image that was asked for, and how far it is."""

    id: str
    state: SampleStatus
    place: int | None = Field(description="How many images are drawn before this one; null if it does not wait.")
    phase: str = Field(description="text (the prompt is encoded), loading (the model), drawing.")
    done: int = Field(description="Steps that are done, of `total`.")
    total: int
    image: str | None = Field(description="Address of the PNG; its metadata has all settings.")
    base_image: str | None = Field(description="Address of the PNG without LoRAs, if that was asked for.")
    asked: SampleRequest
    model: str = Field(description="The model that draws it.")
    loras: list[tuple[str, float]] = Field(description="Files and weights.")
    request: dict[str, Any] = Field(description="Prompt, negative, seed, width, height, steps, guidance, shift.")
    problems: list[ProblemValues]
    memory: MemoryState | None = Field(default=None, description="In the answer to a new request.")


class RunInfo(BaseModel):
    """A run, as its folder shows it."""

    name: str
    state: str = Field(description="waiting, starting, running, done, stopped, failed, never started.")
    step: int
    steps: int
    loss: float | None
    changed_at: float = Field(description="Seconds since 1970.")
    note: str = Field(description="Why it has ended, if it failed.")


class RunDetails(RunInfo):
    """A run with its files and its last lines."""

    config: str = Field(description="YAML.")
    loras: list[str] = Field(description="Paths, the finished one first.")
    previews: dict[int, list[str]] = Field(description="Step: addresses of its preview images.")
    log: list[str]


class Records(BaseModel):
    """Records of steps or events, oldest first."""

    records: list[dict[str, Any]]
    more: bool = Field(description="Whether there are later ones; ask again with `after` = the last step.")


class Gpu(BaseModel):
    """A GPU at this moment."""

    index: str
    name: str
    temperature: float | None = Field(description="°C.")
    load: float | None = Field(description="%.")
    used_gb: float | None
    total_gb: float | None
    run: str | None = Field(description="The run that trains on it.")


class Machine(BaseModel):
    """The machine at this moment."""

    gpus: list[Gpu]
    free_disk_gb: float
    free_memory_gb: float
