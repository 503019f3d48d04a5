"""The browser that the tests of a module share."""

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser

from page_server import open_browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_browser() as opened:
        yield opened
