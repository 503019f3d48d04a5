"""The parts that all pages share: workspace, queue, machine, and the language of a visitor."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import quote

from nicegui import ui

from zimage_train.errors import ZImageTrainError
from zimage_train.ui.jobs import JobQueue
from zimage_train.ui.machine import MachineState, read_machine
from zimage_train.ui.sampling import Sampler
from zimage_train.ui.texts import LANGUAGES, Translate, translator
from zimage_train.ui.workspace import Workspace

LANGUAGE_COOKIE, DARK_COOKIE = "zimage_train_language", "zimage_train_dark"
MACHINE_SECONDS = 5.0
CLOSE = [{"label": "OK", "color": "white"}]
"""The button of a message that stays until it is closed."""


@dataclass
class Site:
    """The parts that pages are made of."""

    workspace: Workspace
    queue: JobQueue
    sampler: Sampler = field(init=False)
    _machine: MachineState | None = None
    _machine_read_at: float = field(default=0.0)

    def __post_init__(self) -> None:
        self.sampler = Sampler(self.workspace, self.queue)

    def machine(self) -> MachineState:
        """Return the state of the machine, at most `MACHINE_SECONDS` old."""
        if self._machine is None or time.monotonic() - self._machine_read_at > MACHINE_SECONDS:
            self._machine, self._machine_read_at = read_machine(self.workspace.runs), time.monotonic()
        return self._machine


def page_language() -> str:
    """Return the language of the page that is built: the one chosen, or else the first that the browser asks for."""
    request = ui.context.client.request
    chosen = request.cookies.get(LANGUAGE_COOKIE, "")
    if chosen in LANGUAGES:
        return chosen
    for entry in request.headers.get("accept-language", "").split(","):
        name = entry.split(";")[0].strip().split("-")[0].lower()
        if name in LANGUAGES:
            return name
    return "en"


def page_texts() -> Translate:
    """Return the texts of the page that is built."""
    return translator(page_language())


def show_problems(error: ZImageTrainError) -> None:
    """Show every problem of an error until it is closed."""
    for problem in error.problems:
        ui.notify(str(problem), type="negative", multi_line=True, actions=CLOSE, timeout=0)


def run_address(name: str) -> str:
    """Return the address of a run's page; a name may have spaces and plus signs."""
    return f"/run/{quote(name)}"


def told(action: Callable[..., object], *arguments: object) -> Callable[[], bool]:
    """Return `action` as a handler that shows the problems of a user's mistake; it returns whether there were none."""

    def act() -> bool:
        try:
            action(*arguments)
        except ZImageTrainError as error:
            show_problems(error)
            return False
        return True

    return act
