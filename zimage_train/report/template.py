"""HTML templates of the pages, with autoescaping of all values (torch-free)."""

from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape

_environment = Environment(
    loader=PackageLoader("zimage_train", "report"), autoescape=select_autoescape(default=True), trim_blocks=True
)


def render_html(template: str, /, **values: Any) -> str:
    """Return the HTML of the file `template` filled with `values`."""
    return _environment.get_template(template).render(**values)
