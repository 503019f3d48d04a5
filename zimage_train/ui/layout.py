"""The frame of every page: header, navigation, language and colours."""

from collections.abc import Iterator
from contextlib import contextmanager

from nicegui import ui

from zimage_train.ui.site import DARK_COOKIE, LANGUAGE_COOKIE, page_language, page_texts
from zimage_train.ui.texts import LANGUAGES, Translate

PAGES = (
    ("runs", "/", "list_alt"),
    ("new", "/new", "add_circle_outline"),
    ("images", "/images", "photo_library"),
    ("try", "/try", "auto_awesome"),
    ("loras", "/loras", "tune"),
)
"""(key, address, icon) of each page."""
DARK = {"auto": None, "light": False, "dark": True}
CSS = """
:root { --line: #d9dde3; --soft: #f4f6f8; --quiet: #57606a; --accent: #1f5fa8; --good: #1a7037; --bad: #b42318; }
.body--dark { --line: #3a4049; --soft: #22262b; --quiet: #aab2bd; --accent: #7db7ff; --good: #6fd08c; --bad: #ff8f85; }
.body--dark, .body--dark .q-header { background: #181b1f; }
body, .q-header { background: #fff; }
.zt-page { width: 100%; max-width: 1320px; margin: 0 auto; padding: 1rem; gap: 1rem; }
.zt-card { border: 1px solid var(--line); border-radius: 10px; padding: 1rem; width: 100%; }
.zt-quiet { color: var(--quiet); }
.zt-title { font-size: 1.35rem; font-weight: 600; }
.zt-head { font-weight: 600; }
.zt-log { font: 12px/1.5 ui-monospace, Menlo, Consolas, monospace; white-space: pre-wrap; overflow-wrap: anywhere;
  background: var(--soft); border-radius: 8px; padding: .75rem; max-height: 22rem; overflow: auto; width: 100%; }
.zt-status { font-size: .78rem; font-weight: 600; padding: .1rem .55rem; border-radius: 999px; border: 1px solid; }
.zt-status-running, .zt-status-starting { color: var(--accent); }
.zt-status-done { color: var(--good); }
.zt-status-failed { color: var(--bad); }
.zt-status-waiting, .zt-status-stopped, .zt-status-never { color: var(--quiet); }
.zt-nav { color: var(--quiet); text-decoration: none; padding: .4rem .6rem; border-radius: 8px; font-weight: 500;
  display: flex; gap: .35rem; align-items: center; }
.zt-nav:hover, .zt-nav:focus-visible { background: var(--soft); }
.zt-nav-here { color: var(--accent); background: var(--soft); }
.zt-pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(140px, 1fr)); gap: .6rem; width: 100%; }
.zt-pictures figure { margin: 0; min-width: 0; }
.zt-pictures figcaption { font-size: .78rem; line-height: 1.3; margin-top: .2rem; overflow-wrap: anywhere; }
.zt-finding { border-color: #b7791f; display: flex; flex-direction: column; gap: .35rem; }
.zt-pictures img { width: 100%; border-radius: 8px; background: var(--soft); cursor: zoom-in; display: block; }
a.zt-link { color: var(--accent); }
.cm-editor .zt-bad-line { background: color-mix(in srgb, var(--bad) 22%, transparent); }
.body--dark .cm-editor { filter: invert(.9) hue-rotate(180deg); }
.text-link { color: var(--accent); }
.zt-drop .q-uploader__list { min-height: 0; padding: 0; }
.zt-drop .q-uploader__subtitle { display: none; }
@media (max-width: 700px) { .zt-nav > div { display: none; } .zt-page { padding: .6rem; } }
"""

SEARCH_KEY = """<script>
document.addEventListener("keydown", event => {
  const writes = /^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName) || event.target.isContentEditable;
  const search = document.querySelector(".zt-search input");
  if (event.key === "/" && search && !writes) { search.focus(); event.preventDefault(); }
});
</script>"""
"""In the browser, so that no key typed right after `/` is lost."""


@contextmanager
def page_frame(here: str) -> Iterator[Translate]:
    """Build the frame of the page whose key is `here`; the block fills it."""
    t = page_texts()
    ui.add_css(CSS)
    ui.colors(primary="#2f6fb8", positive="#1a7037", negative="#b42318")
    dark = ui.context.client.request.cookies.get(DARK_COOKIE, "auto")
    ui.dark_mode(DARK.get(dark))
    ui.add_body_html(SEARCH_KEY)
    ui.page_title(f"{t('nav.' + here)} · zimage-train")
    with ui.header().classes("items-center justify-between text-inherit").style("border-bottom: 1px solid var(--line)"):
        with ui.element("nav").classes("flex items-center gap-1").props(f'aria-label="{t("nav.label")}"'):
            ui.link("zimage-train", "/").classes("zt-head no-underline text-inherit mr-3 max-sm:hidden")
            for key, address, icon in PAGES:
                with ui.link(target=address).classes("zt-nav" + (" zt-nav-here" if key == here else "")) as link:
                    ui.icon(icon, size="20px").props('aria-hidden="true"')
                    ui.label(t(f"nav.{key}"))
                link.props(f'aria-label="{t(f"nav.{key}")}"' + (' aria-current="page"' if key == here else ""))
        with ui.row().classes("items-center gap-2 no-wrap"):
            _choice(LANGUAGES, page_language(), LANGUAGE_COOKIE, t("nav.language"))
            _choice({name: t(f"dark.{name}") for name in DARK}, dark, DARK_COOKIE, t("nav.colours"))
    with ui.column().classes("zt-page") as main:
        main.props("role=main")
        yield t


def _choice(options: dict[str, str], value: str, cookie: str, label: str) -> None:
    """Build a choice that is kept in a cookie and builds the page anew."""

    def keep(chosen: str) -> None:
        ui.run_javascript(
            f"document.cookie='{cookie}={chosen};path=/;max-age=31536000;samesite=strict';location.reload()"
        )

    chooser = ui.select(options, value=value if value in options else next(iter(options)))
    chooser.props(f'dense options-dense borderless aria-label="{label}"').on_value_change(
        lambda event: keep(event.value)
    )
