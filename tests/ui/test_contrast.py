"""Contrast of all text by WCAG 2 AA, names of all controls, and the width of small screens."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, Page

from page_server import PageServer, page_server

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("warm_processes")]

PAGES = ("/", "/run/done", "/new", "/images", "/try", "/loras")
TRANSITION_MS = 500
"""Colours and widths change within less."""
CONTRASTS = """() => {
  const channel = value => { value /= 255; return value <= .04045 ? value / 12.92 : ((value + .055) / 1.055) ** 2.4; };
  const luminance = ([r, g, b]) => .2126 * channel(r) + .7152 * channel(g) + .0722 * channel(b);
  const parse = text => (text.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number);
  const blend = (over, under) => {
    const alpha = over.length > 3 ? over[3] : 1;
    return [0, 1, 2].map(i => alpha * over[i] + (1 - alpha) * under[i]);
  };
  const background = element => {
    const layers = [];
    for (let at = element; at; at = at.parentElement) {
      const color = parse(getComputedStyle(at).backgroundColor);
      if (color.length < 4 || color[3] > 0) layers.push(color);
      if (color.length < 4 || color[3] === 1) break;
    }
    return layers.reverse().reduce((under, over) => blend(over, under), [255, 255, 255]);
  };
  const bad = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement, style = getComputedStyle(element);
    const box = element.getBoundingClientRect();
    const isHidden = style.visibility === "hidden" || !box.width || !box.height || !element.checkVisibility();
    const isOut = element.closest(".cm-editor, canvas, [aria-hidden=true], .disabled, [disabled], style, script, i");
    if (!walker.currentNode.textContent.trim() || isHidden || isOut) continue;
    let opacity = 1;
    for (let at = element; at; at = at.parentElement) opacity *= Number(getComputedStyle(at).opacity);
    const under = background(element), color = parse(style.color);
    const over = blend([color[0], color[1], color[2], (color[3] ?? 1) * opacity], under);
    const [light, dark] = [luminance(over), luminance(under)].sort((a, b) => b - a);
    const ratio = (light + .05) / (dark + .05), size = parseFloat(style.fontSize);
    const isLarge = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700);
    const text = walker.currentNode.textContent.trim().slice(0, 40);
    if (ratio < (isLarge ? 3 : 4.5)) bad.push(`${ratio.toFixed(2)} ${text}`);
  }
  return [...new Set(bad)];
}"""
UNNAMED = """() => [...document.querySelectorAll("button, a[href], input:not([type=hidden]), textarea, select, img")]
  .filter(one => one.checkVisibility() && one.tabIndex >= 0 && !one.closest("[aria-hidden=true]"))
  .filter(one => !(one.getAttribute("aria-label") || one.getAttribute("alt") !== null || one.textContent.trim()
    || one.getAttribute("aria-labelledby") || one.closest("label")?.textContent.trim() || one.title))
  .map(one => one.outerHTML.slice(0, 120))"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PageServer]:
    folder = tmp_path_factory.mktemp("seen")
    run = folder / "runs" / "done"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("name: done\ntrain: {steps: 2}\n")
    (run / "log.txt").write_text("2026-01-01 warning: something is odd\n")
    records = [f'{{"step": {step}, "loss": 1.0, "lr": 1e-4, "sigma": [0.5]}}\n' for step in (1, 2)]
    (run / "metrics.jsonl").write_text("".join(records))
    with page_server(folder) as started:
        yield started


def opened(browser: Browser, address: str) -> Page:
    page = browser.new_context(locale="en-US").new_page()
    page.goto(address)
    page.wait_for_timeout(1500)
    return page


@pytest.fixture(scope="module", params=PAGES)
def page(browser: Browser, server: PageServer, request: pytest.FixtureRequest) -> Iterator[Page]:
    page = opened(browser, server.address + request.param)
    yield page
    page.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read(page: Page, scheme: Any):
    page.emulate_media(color_scheme=scheme)
    page.wait_for_selector(f"body.body--{scheme}")
    page.wait_for_timeout(TRANSITION_MS)
    assert page.evaluate(CONTRASTS) == []
    assert page.evaluate(UNNAMED) == []


def test_small_screens_fit(page: Page):
    page.set_viewport_size({"width": 390, "height": 800})
    page.wait_for_timeout(TRANSITION_MS)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_contrast_is_measured(browser: Browser, server: PageServer):
    """A pale text and a button without a name are found."""
    page = opened(browser, server.address)
    page.evaluate("document.body.insertAdjacentHTML('beforeend', '<p style=\"color:#bbb;background:#fff\">pale</p>')")
    page.evaluate("document.body.insertAdjacentHTML('beforeend', '<button></button>')")
    assert [line.split()[1] for line in page.evaluate(CONTRASTS)] == ["pale"] and len(page.evaluate(UNNAMED)) == 1
    page.context.close()


@pytest.mark.parametrize(("name", "status"), [("..%2Fx", 404), (".queue", 200), ("none", 200), ("_done%20%2B", 200)])
def test_odd_names_of_runs(server: PageServer, name: str, status: int):
    """An address of no run is a page that says so, and never an error of ours."""
    answer = httpx.get(f"{server.address}/run/{name}")
    assert answer.status_code == status and "Internal Server Error" not in answer.text
