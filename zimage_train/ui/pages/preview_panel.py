"""The previews of a run: those of a step, chosen by a slider or the arrow keys, each enlarged beside step 0."""

from functools import partial
from pathlib import Path

from nicegui import events, ui

from zimage_train.ui import run_state
from zimage_train.ui.media import small_url
from zimage_train.ui.pages.preview_zoom import PreviewZoom
from zimage_train.ui.texts import Translate

SMALL_PX = 384
STEP_MOVES = {"ArrowLeft": -1, "ArrowRight": 1}
PROMPT_MOVES = {"ArrowUp": -1, "ArrowDown": 1}


class PreviewPanel:
    """The panel for one browser."""

    def __init__(self, folder: Path, t: Translate) -> None:
        self._folder, self._t = folder, t
        self._previews: dict[int, list[str]] = {}
        self._step: int | None = None
        """The step whose previews are shown; None for the newest."""

    def build(self) -> None:
        t = self._t
        with ui.element("section").classes("zt-card"):
            with ui.row().classes("w-full items-center justify-between"):
                ui.label(t("run.previews")).classes("zt-head")
                self._step_label = ui.label().classes("zt-quiet")
            self._slider = ui.slider(min=0, max=1, step=1, value=0).props(f'markers snap aria-label="{t("run.step")}"')
            self._slider.on_value_change(self._slide)
            self._pictures = ui.element("div").classes("zt-pictures")
        self._zoom = PreviewZoom(t, self._move)
        ui.keyboard(on_key=self._key)

    def show(self, previews: dict[int, list[str]]) -> None:
        """Show the previews that there are now, at the step that was chosen."""
        self._previews = previews
        steps = self._steps
        self._slider.set_visibility(len(steps) > 1)
        self._slider.props["max"] = max(len(steps) - 1, 1)
        self._slider.value = steps.index(self._step) if self._step in steps else max(len(steps) - 1, 0)
        self._slider.update()
        self._show_pictures()

    @property
    def _steps(self) -> list[int]:
        return sorted(self._previews)

    def _slide(self, event: events.ValueChangeEventArguments) -> None:
        steps = self._steps
        if steps:
            self._step = steps[int(event.value)] if event.value < len(steps) - 1 else None
            self._show_pictures()

    def _key(self, event: events.KeyEventArguments) -> None:
        """Go to another step by left and right, and from an enlarged preview to another prompt by up and down."""
        key = str(event.key)
        if not event.action.keydown or not self._previews:
            return
        if key in STEP_MOVES:
            self._move(STEP_MOVES[key])
        elif key in PROMPT_MOVES and self._zoom.is_open:
            names = self._previews[self._shown_step]
            places = [_place_of(name) for name in names]
            if self._zoom.place in places:
                index = (places.index(self._zoom.place) + PROMPT_MOVES[key]) % len(names)
                self._enlarge(self._shown_step, names[index])

    def _move(self, steps: int) -> None:
        """Go to a later or an earlier step."""
        self._slider.value = min(max((self._slider.value or 0) + steps, 0), len(self._previews) - 1)

    @property
    def _shown_step(self) -> int:
        return self._steps[-1] if self._step is None else self._step

    def _show_pictures(self) -> None:
        self._pictures.clear()
        if not self._previews:
            self._step_label.text = self._t("run.no_previews")
            return
        step = self._shown_step
        self._step_label.text = self._t("run.at_step", step=step)
        with self._pictures:
            for name in self._previews[step]:
                self._build_picture(step, name)
        # The enlarged preview goes along to the other step.
        if self._zoom.is_open:
            for name in self._previews[step]:
                if _place_of(name) == self._zoom.place:
                    self._enlarge(step, name)

    def _build_picture(self, step: int, name: str) -> None:
        path = self._folder / "samples" / name
        label = self._label_of(name)
        with ui.element("figure"):
            picture = ui.element("img").props("loading=lazy tabindex=0 role=button")
            picture.props["src"] = small_url(path, SMALL_PX)
            picture.props["alt"] = label
            picture.on("click", partial(self._enlarge, step, name))
            picture.on("keydown.enter", partial(self._enlarge, step, name))
            with ui.element("figcaption").classes("zt-quiet"):
                ui.label(label)

    def _label_of(self, name: str) -> str:
        """Return the prompt of a preview, and what it was drawn with beside the LoRA at its whole weight."""
        prompt = run_state.prompt_of(self._folder / "samples" / name)
        subfolder = Path(name).parent.name
        if subfolder == "also":
            return self._t("run.on_second_model", prompt=prompt)
        return f"{prompt} ({subfolder.replace('_', ' ')})" if subfolder else prompt

    def _enlarge(self, step: int, name: str) -> None:
        samples, first_step = self._folder / "samples", self._steps[0]
        place = _place_of(name)
        images = [(self._t("run.at_step", step=step), samples / name)]
        firsts = [other for other in self._previews[first_step] if _place_of(other) == place]
        if firsts:
            label = self._t("run.first") if first_step == 0 else self._t("run.at_step", step=first_step)
            images.insert(0, (label, samples / firsts[0]))
        self._zoom.show(place, self._label_of(name), images)


def _place_of(name: str) -> str:
    """Return the name of a preview without its step: the same prompt at another step has the same."""
    path = Path(name)
    return f"{path.parent}/{path.name.partition('-')[2]}"
