"""What rented machines cost: a dated file that people edit (torch-free)."""

from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError, field_validator

from zimage_train.config import load
from zimage_train.config.section import Section
from zimage_train.errors import ConfigError, Location, Problem
from zimage_train.planning.gpus import GPU_SPECS

Price = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]


class Prices(Section):
    """In one currency; see scripts/runpod/prices.yaml."""

    date: Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\d$")]
    currency: str = "USD"
    gpus: dict[str, Price]
    """Of an hour of one card."""
    cpu_pod: Price = 0.0
    """Of an hour of the machine that downloads."""
    volume: Price = 0.0
    """Of a GB for a month."""
    volume_gb: Price = 50.0
    days: Price = 7.0
    megabytes_per_second: Annotated[float, Field(gt=0, le=1e5)] = 100.0
    """From the hub to the volume."""
    start_minutes: Price = 5.0
    """Of a GPU until it trains."""

    @field_validator("date", mode="before")
    @classmethod
    def _as_text(cls, value: object) -> object:
        return str(value)

    @field_validator("gpus", mode="before")
    @classmethod
    def _known(cls, value: object) -> object:
        """Names of cards as text: YAML reads 4090 as a number."""
        if not isinstance(value, dict) or not value:
            raise ValueError("name at least one card and its price of an hour")
        named = {str(name): price for name, price in value.items()}
        if unknown := [name for name in named if name not in GPU_SPECS]:
            raise ValueError(f"{', '.join(unknown)}: not known; the cards are {', '.join(GPU_SPECS)}")
        return named

    @property
    def keeping(self) -> float:
        """What the volume costs."""
        return self.volume * self.volume_gb * self.days / 30


def read(path: Path) -> Prices:
    """The price file at `path`.

    Raises:
        ConfigError: lists everything that is wrong in it.
    """
    document = load.parse(path, load.read_text(path))
    problems = [load.yaml_problem(path, problem) for problem in document.problems]
    if problems:
        raise ConfigError(*problems)
    try:
        return Prices.model_validate(document.value)
    except ValidationError as error:
        raise ConfigError(*(_problem(path, one["loc"], one["msg"]) for one in error.errors())) from None


def _problem(path: Path, place: tuple[int | str, ...], message: str) -> Problem:
    where = Location(str(path), key=".".join(map(str, place)) or "the file")
    return Problem(where, message.removeprefix("Value error, "), "see scripts/runpod/prices.yaml", "bad-value")
