"""Rows of LoRA files with their strengths, as forms have them."""

from pathlib import Path

from nicegui import ui

from zimage_train.ui.pages.buttons import flat_button, icon_button
from zimage_train.ui.sample_request import SampleLora
from zimage_train.ui.texts import Translate


class LoraRows:
    """A list of LoRAs that grows and shrinks.

    Args:
        empty_text: the text while there is none.
    """

    def __init__(self, t: Translate, empty_text: str) -> None:
        self._t, self._empty_text = t, empty_text
        self.loras: list[SampleLora] = []
        self.labels: dict[str, str] = {}
        """File -> how the page calls it, of all that can be chosen."""

    def build(self) -> None:
        self._rows = ui.column().classes("w-full gap-2")
        flat_button("add", self._t("try.add_lora"), self.add)
        self.show()

    def set(self, loras: list[SampleLora]) -> None:
        """Show these LoRAs in place of the ones that were there."""
        self.loras = loras
        self.show()

    def add(self) -> None:
        """Add a row with the first file that no row has."""
        used = {lora.file for lora in self.loras}
        free = [file for file in self.labels if file not in used]
        self.set([*self.loras, SampleLora(file=free[0] if free else "")])

    def show(self) -> None:
        self._rows.clear()
        with self._rows:
            if not self.loras:
                ui.label(self._empty_text).classes("zt-quiet text-sm")
            for lora in self.loras:
                self._build_row(lora)

    def _build_row(self, lora: SampleLora) -> None:
        t = self._t
        labels = self.labels | {lora.file: self.labels.get(lora.file, Path(lora.file).name)}
        with ui.column().classes("w-full gap-0"):
            with ui.row().classes("w-full no-wrap items-center gap-1"):
                file = lora_choice(labels, lora.file, t("try.lora"))
                file.on_value_change(lambda event: setattr(lora, "file", event.value or ""))
                icon_button("close", t("try.remove_lora"), lambda: self._remove(lora))
            with ui.row().classes("w-full no-wrap items-center gap-3 pl-1"):
                slider = (
                    ui.slider(min=-1, max=2, step=0.05).props(f'aria-label="{t("try.strength")}"').classes("flex-1")
                )
                number = ui.number(value=lora.weight, step=0.05, min=-100, max=100)
                number.props(f'dense borderless aria-label="{t("try.strength")}"').classes("w-16")
                slider.bind_value(number, "value", forward=lambda value: round(value or 0.0, 2))
                number.on_value_change(lambda event: setattr(lora, "weight", event.value or 0.0))

    def _remove(self, lora: SampleLora) -> None:
        self.set([other for other in self.loras if other is not lora])


def lora_choice(labels: dict[str, str], value: str | None, label: str) -> ui.select:
    """Build a choice of a LoRA file in which one can type to search."""
    choice = ui.select(labels, value=value, label=label, with_input=True).classes("flex-1 min-w-0")
    return choice.props("dense outlined options-dense hide-selected fill-input input-debounce=0")
