"""The panels that change many captions at once: tags, and search and replace."""

import difflib
from functools import partial
from typing import Any

from nicegui import ui

from zimage_train.errors import ZImageTrainError
from zimage_train.ui.caption_edits import count_tags, renaming_tag, replacing
from zimage_train.ui.pages.image_session import ImageSession, News
from zimage_train.ui.pages.runs import confirmed
from zimage_train.ui.site import show_problems

MAX_TAGS = 60
"""Tags that are shown, the most frequent."""
MAX_EXAMPLES = 4
CONTEXT = 40
"""Characters that an example shows on each side of the change."""
CSS = """
.zt-tags { display: flex; flex-wrap: wrap; gap: .3rem; }
.zt-tags button { border: 1px solid var(--line); border-radius: 999px; padding: .1rem .55rem; font-size: .8rem;
  background: transparent; color: inherit; cursor: pointer; max-width: 100%;
  overflow: hidden; text-overflow: ellipsis; }
.zt-tags button:hover, .zt-tags button:focus-visible { background: var(--soft); }
.zt-tags button[aria-pressed="true"] { border-color: var(--accent); color: var(--accent); font-weight: 600; }
.zt-change { font-size: .8rem; overflow-wrap: anywhere; border-left: 3px solid var(--line); padding-left: .5rem; }
.zt-change del { color: var(--bad); }
.zt-change ins { color: var(--good); text-decoration: none; font-weight: 600; }
"""


class TagPanel:
    """The tags of all captions with their counts; the chosen tag can be renamed or removed everywhere."""

    def __init__(self, session: ImageSession) -> None:
        self._session = session

    def build(self) -> None:
        """Build the panel."""
        t = self._session.t
        self._panel = ui.expansion(t("images.tags"), icon="sell").classes("w-full")
        with self._panel:
            self._find = ui.input(placeholder=t("images.find_tag")).props("dense outlined clearable debounce=250")
            self._find.props(f'aria-label="{t("images.find_tag")}"').classes("w-full").on_value_change(self._draw)
            with ui.row().classes("w-full items-center gap-1") as self._actions:
                self._new = ui.input(label=t("images.new_tag")).props("dense outlined").classes("flex-1 min-w-24")
                ui.button(t("images.rename"), on_click=self._rename).props("flat dense no-caps")
                ui.button(t("images.remove"), on_click=self._remove).props("flat dense no-caps color=negative")
            self._tags = ui.element("div").classes("zt-tags w-full pt-1")
            self._more = ui.label().classes("zt-quiet text-xs")
        self._session.listen(self._hear)
        self._draw()

    def _hear(self, news: News) -> None:
        self._draw()

    def _draw(self, *_: Any) -> None:
        session, t = self._session, self._session.t
        counts = count_tags(session.captions)
        self._panel.text = f"{t('images.tags')} ({len(counts)})"
        query = (self._find.value or "").casefold()
        found = [(tag, count) for tag, count in counts if query in tag.casefold()]
        self._actions.set_visibility(session.tag is not None)
        self._tags.clear()
        with self._tags:
            for tag, count in found[:MAX_TAGS]:
                with ui.element("button").props(f"aria-pressed={'true' if tag == session.tag else 'false'}") as button:
                    ui.label(f"{tag} {count}").classes("inline")
                button.on("click", partial(self._choose, tag))
        more = len(found) - MAX_TAGS
        self._more.text = t("images.more_tags", count=more) if more > 0 else ""

    def _choose(self, tag: str) -> None:
        chosen = None if tag == self._session.tag else tag
        self._new.value = chosen or ""
        self._session.filter(tag=chosen)

    async def _rename(self) -> None:
        tag, new = self._session.tag, (self._new.value or "").strip()
        if tag is None or not new or new == tag:
            return
        try:
            change = renaming_tag(tag, new)
        except ZImageTrainError as error:
            show_problems(error)
            return
        await self._session.edit(change)
        self._session.filter(tag=new)

    async def _remove(self) -> None:
        tag, t = self._session.tag, self._session.t
        if tag is None:
            return
        change = renaming_tag(tag, "")
        count = len(self._session.editor.preview(change, self._session.folder.images))
        if await confirmed(t("images.remove_question", tag=tag, count=count), t("images.remove"), t):
            await self._session.edit(change)
            self._session.filter(tag=None)


class ReplacePanel:
    """Search and replace over the captions of the images that are shown, with a preview."""

    def __init__(self, session: ImageSession) -> None:
        self._session = session

    def build(self) -> None:
        """Build the panel."""
        t = self._session.t
        with ui.expansion(t("images.replace"), icon="find_replace").classes("w-full"):
            self._search = ui.input(label=t("images.replace_what")).props("dense outlined debounce=250")
            self._words = ui.input(label=t("images.replace_by")).props("dense outlined debounce=250")
            self._case = ui.checkbox(t("images.match_case"))
            for part in (self._search, self._words, self._case):
                part.classes("w-full").on_value_change(self._draw)
            self._count = ui.label().props("role=status").classes("zt-quiet")
            self._examples = ui.column().classes("w-full gap-1")
            self._apply = ui.button(t("images.replace_now"), icon="done", on_click=self._replace).props("no-caps")
        self._session.listen(self._hear)
        self._draw()

    def _hear(self, news: News) -> None:
        self._draw()

    def _preview(self) -> dict[str, tuple[str, str]]:
        session = self._session
        if not self._search.value:
            return {}
        change = replacing(self._search.value, self._words.value or "", bool(self._case.value))
        return session.editor.preview(change, (name for name in session.names if name in session.folder.images))

    def _draw(self, *_: Any) -> None:
        session, t = self._session, self._session.t
        previewed = self._preview()
        self._apply.set_enabled(bool(previewed))
        self._examples.clear()
        if not self._search.value:
            self._count.text = t("images.replace_hint")
            return
        self._count.text = t("images.will_change", count=len(previewed), total=len(session.names))
        with self._examples:
            for before, after in list(previewed.values())[:MAX_EXAMPLES]:
                with ui.element("div").classes("zt-change"):
                    for tag, text in first_change(before, after):
                        with ui.element(tag):
                            ui.label(text).classes("inline")

    async def _replace(self) -> None:
        await self._session.apply(self._preview())


def first_change(before: str, after: str) -> list[tuple[str, str]]:
    """Return the first words that change, and a little around them, as (element of HTML, text)."""
    old, new = before.split(" "), after.split(" ")
    for kind, start, end, new_start, new_end in difflib.SequenceMatcher(None, old, new, False).get_opcodes():
        if kind != "equal":
            lead, tail = " ".join(old[:start])[-CONTEXT:], " ".join(old[end:])[:CONTEXT]
            removed, added = " ".join(old[start:end]), " ".join(new[new_start:new_end])
            return [("span", f"{lead} "), ("del", removed), ("span", " "), ("ins", added), ("span", f" {tail}")]
    return [("span", before[: 2 * CONTEXT])]
