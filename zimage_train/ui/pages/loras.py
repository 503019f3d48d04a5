"""LoRA files: inspect, verify, convert, merge, resize, compare."""

from collections.abc import Callable
from pathlib import Path

from nicegui import events, run, ui

from zimage_train.errors import ZImageTrainError
from zimage_train.io import atomic
from zimage_train.ui.layout import page_frame
from zimage_train.ui.lora_files import list_loras
from zimage_train.ui.lora_tools import LAYOUTS, MERGE_METHODS, Command, LoraTools, Outcome, ToolRun
from zimage_train.ui.media import download_url, whole_url
from zimage_train.ui.pages.buttons import flat_button
from zimage_train.ui.pages.lora_rows import LoraRows, lora_choice
from zimage_train.ui.sample_request import SampleLora
from zimage_train.ui.site import Site, show_problems
from zimage_train.ui.texts import Translate

TABS = {
    "inspect": "grid_on",
    "verify": "verified",
    "convert": "swap_horiz",
    "merge": "merge",
    "resize": "compress",
    "diff": "difference",
}
MAX_UPLOAD_BYTES = 4_000_000_000


def register(site: Site) -> None:
    """Add the page; `?file=PATH` opens it with a file."""

    @ui.page("/loras")
    def loras_page(file: str = "") -> None:
        with page_frame("loras") as t:
            ui.label(t("nav.loras")).classes("zt-title").props("role=heading aria-level=1")
            LorasPage(site, t).build(file)


class LorasPage:
    """The page for one browser."""

    def __init__(self, site: Site, t: Translate) -> None:
        self._site, self._t = site, t
        self._tools = LoraTools(site.workspace)
        self._rows = LoraRows(t, t("loras.merge_none"))
        self._running: ToolRun | None = None
        self._results: dict[str, ui.column] = {}
        """Tab -> the place of its command's output."""
        self._names: list[tuple[ui.input, Callable[[str], str]]] = []
        """The fields for names of new files, and the suggestion of each for the stem of the chosen file."""

    def build(self, file: str) -> None:
        """Build the choice of a file, the tabs, and the place of results."""
        t = self._t
        with ui.element("section").classes("zt-card"), ui.row().classes("w-full items-stretch gap-3"):
            self._file = lora_choice({}, None, t("loras.file")).classes("min-w-64 self-center")
            self._file.on_value_change(self._choose)
            upload = ui.upload(
                label=t("loras.upload"), auto_upload=True, max_file_size=MAX_UPLOAD_BYTES, on_upload=self._take_upload
            )
            upload.props('accept=".safetensors" flat bordered').classes("zt-upload w-80 max-w-full")
            ui.add_css(".zt-upload .q-uploader__list { display: none; }")
        with ui.element("section").classes("zt-card"):
            with (
                ui.tabs().props("no-caps align=left dense outside-arrows mobile-arrows").classes("w-full") as self._tabs
            ):
                for name, icon in TABS.items():
                    ui.tab(name, t(f"loras.{name}"), icon)
            with ui.tab_panels(self._tabs, value="inspect").classes("w-full bg-transparent"):
                for name, build in (
                    ("inspect", self._build_inspect),
                    ("verify", self._build_verify),
                    ("convert", self._build_convert),
                    ("merge", self._build_merge),
                    ("resize", self._build_resize),
                    ("diff", self._build_diff),
                ):
                    with ui.tab_panel(name).classes("px-0"):
                        with ui.column().classes("w-full gap-3 max-w-2xl"):
                            ui.label(t(f"loras.{name}_help")).classes("zt-quiet")
                            build()
                        self._results[name] = ui.column().classes("w-full gap-3 pt-4").props('aria-live="polite"')
        ui.timer(0.05, lambda: self._list_files(file), once=True)
        ui.context.client.on_delete(self._leave)

    def _build_inspect(self) -> None:
        self._button("inspect", lambda: self._tools.inspect(self._chosen))

    def _build_verify(self) -> None:
        self._button("verify", lambda: self._tools.verify(self._chosen))

    def _build_convert(self) -> None:
        t = self._t
        layout = ui.select(list(LAYOUTS), value="diffusers", label=t("loras.layout")).props("dense outlined")
        name = self._name_field(lambda stem: f"{stem}-{layout.value}")
        layout.classes("w-56").on_value_change(lambda: self._suggest_names())
        self._button("convert", lambda: self._tools.convert(self._chosen, layout.value, name.value or ""))

    def _build_merge(self) -> None:
        t = self._t
        self._rows.build()
        with ui.row().classes("gap-3 items-center"):
            method = ui.select(list(MERGE_METHODS), value="sum", label=t("loras.method")).props("dense outlined")
            method.classes("w-36")
            density = ui.number(t("loras.density"), value=0.5, min=0.05, max=1, step=0.05).props("dense outlined")
            density.classes("w-52").bind_visibility_from(method, "value", lambda value: value != "sum")
            rank = ui.number(t("loras.rank_merge"), min=1, step=1).props("dense outlined clearable").classes("w-44")
            normalize = ui.checkbox(t("loras.normalize"))
        name = self._name_field(lambda stem: "merged")

        def command() -> Command:
            files = [(lora.file, lora.weight) for lora in self._rows.loras]
            whole_rank = None if rank.value is None else int(rank.value)
            return self._tools.merge(
                files, name.value or "", method.value, density.value, whole_rank, normalize.value is True
            )

        self._button("merge", command)

    def _build_resize(self) -> None:
        t = self._t
        is_auto = ui.checkbox(t("loras.rank_auto"))
        with ui.row().classes("gap-3"):
            rank = ui.number(t("loras.rank"), value=8, min=1, max=4096, step=1).props("dense outlined").classes("w-36")
            rank.bind_visibility_from(is_auto, "value", lambda value: not value)
            energy = ui.number(t("loras.energy"), value=0.99, min=0, max=1, step=0.01).props("dense outlined")
            energy.classes("w-56").bind_visibility_from(is_auto, "value")
        name = self._name_field(lambda stem: f"{stem}-" + ("small" if is_auto.value else f"rank{rank.value or 8:g}"))
        for field in (is_auto, rank):
            field.on_value_change(lambda: self._suggest_names())

        def command() -> Command:
            whole_rank = None if is_auto.value else int(rank.value or 0)
            return self._tools.resize(self._chosen, whole_rank, energy.value or 0.0, name.value or "")

        self._button("resize", command)

    def _build_diff(self) -> None:
        self._other = lora_choice({}, None, self._t("loras.other")).classes("w-full")
        self._button("diff", lambda: self._tools.diff(self._chosen, self._other.value or ""))

    @property
    def _chosen(self) -> str:
        return self._file.value or ""

    def _name_field(self, suggest: Callable[[str], str]) -> ui.input:
        """Build the field for the name of a new file, which follows the chosen file until somebody types there."""
        field = ui.input(self._t("loras.name")).props('dense outlined suffix=".safetensors"').classes("w-full")
        self._names.append((field, suggest))
        return field

    def _suggest_names(self) -> None:
        stem = Path(self._chosen).stem
        if stem:
            for field, suggest in self._names:
                field.value = self._tools.free_name(suggest(stem))

    def _button(self, name: str, command: Callable[[], Command]) -> None:
        """Build the button that runs a command."""
        button = ui.button(self._t(f"loras.{name}"), icon=TABS[name], on_click=lambda: self._run(name, command))
        button.props("no-caps")

    async def _list_files(self, file: str = "") -> None:
        choices = await run.io_bound(list_loras, self._site.workspace)
        labels = {str(choice.path): choice.label for choice in choices or []}
        self._rows.labels = labels
        self._rows.show()
        self._other.set_options(labels, value=self._other.value)
        value = self._file.value or (file if file in labels else None)
        self._file.set_options(labels, value=value)

    async def _choose(self) -> None:
        """Inspect the file that was chosen, and let the forms have it."""
        self._suggest_names()
        if not self._rows.loras and self._chosen:
            self._rows.set([SampleLora(file=self._chosen)])
        if self._chosen and self._tabs.value == "inspect":
            await self._run("inspect", lambda: self._tools.inspect(self._chosen))

    async def _take_upload(self, event: events.UploadEventArguments) -> None:
        try:
            path = self._tools.place_of_upload(event.file.name)
            with atomic.replace_atomically(path) as file:
                async for chunk in event.file.iterate():
                    file.write(chunk)
        except ZImageTrainError as error:
            show_problems(error)
            return
        ui.notify(self._t("loras.uploaded", name=path.name, folder=path.parent), type="positive")
        event.sender.run_method("reset")
        await self._list_files()
        self._file.value = str(path)

    async def _run(self, tab: str, make: Callable[[], Command]) -> None:
        """Run the command of a tab, and show its output there."""
        self._stop()
        try:
            command = make()
        except ZImageTrainError as error:
            show_problems(error)
            return
        tool = self._running = ToolRun(command)
        results = self._results[tab]
        results.clear()
        with results, ui.row().classes("w-full items-center gap-3 no-wrap") as self._working:
            bar = ui.linear_progress(0, show_value=False, size="6px").props("rounded indeterminate").classes("flex-1")
            bar.props(f'aria-label="{self._t("loras.working")}"')
            flat_button("stop", self._t("loras.stop"), self._stop)

        def progress(done: int, total: int) -> None:
            bar.props(remove="indeterminate").set_value(done / total if total else 0.0)

        outcome = await tool.run(progress)
        if self._running is not tool:
            return  # another command has begun, or the page is gone
        self._stop()
        with results:
            self._show(command, outcome)
        if command.files():
            await self._list_files()

    def _stop(self) -> None:
        tool, self._running = self._running, None
        if tool is not None:
            tool.stop()
            self._working.delete()

    def _leave(self) -> None:
        """End what runs when the browser is gone, and with it the elements of the page."""
        tool, self._running = self._running, None
        if tool is not None:
            tool.stop()

    def _show(self, command: Command, outcome: Outcome) -> None:
        t = self._t
        for line in outcome.errors:
            with ui.element("section").classes("zt-card").style("border-color: var(--bad)"):
                ui.label(t("loras.failed")).classes("zt-status zt-status-failed").style("width: fit-content")
                ui.label(line).style("white-space: pre-wrap; overflow-wrap: anywhere")
        if command.files():
            with ui.element("section").classes("zt-card"):
                ui.label(t("loras.made")).classes("zt-head")
                for path in command.files():
                    ui.link(path.name, download_url(path)).classes("zt-link block")
        if command.plot is not None and command.plot.exists() and not outcome.errors:
            ui.label(t("loras.heatmap")).classes("zt-head")
            picture = ui.element("img").style("max-width: 100%; border-radius: 8px; border: 1px solid var(--line)")
            picture.props["src"], picture.props["alt"] = whole_url(command.plot), t("loras.heatmap")
        lines = [line for line in outcome.lines if not line.startswith("heat map: ")]
        if lines:
            log = ui.label("\n".join(lines)).classes("zt-log").props("tabindex=0")
            log.style("max-height: none; white-space: pre; overflow-wrap: normal")
