"""The documentation builds as a site: every page stands in its menu, every link leads somewhere, all of it is local."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_pages_are_built_and_found(site: Path):
    """Every page is built, and found by the search."""
    pages = {path.relative_to(ROOT / "docs").with_suffix("") for path in (ROOT / "docs").rglob("*.md")}
    index = (site / "search" / "search_index.json").read_text(encoding="utf-8")
    for page in pages - {Path("index")}:
        assert (site / page / "index.html").exists()
        assert f'"location":"{page.as_posix()}/"' in index


@pytest.mark.slow
def test_pages_are_self_contained(site: Path):
    """A page loads nothing from elsewhere."""
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|iframe|source)[^>]*\ssrc=\"?([^\" >]+)", text)
        loaded += re.findall(r"<link[^>]*rel=\"?(?:stylesheet|preconnect|icon)[^>]*href=\"?([^\" >]+)", text)
        loaded += re.findall(r"<link[^>]*href=\"?([^\" >]+)[^>]*rel=\"?(?:stylesheet|preconnect|icon)", text)
        assert loaded and [one for one in loaded if "//" in one] == [], page
