"""The pages' one template mechanism: everything from a user is escaped, and all pages look alike (torch-free)."""

from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape

_environment = Environment(
    loader=PackageLoader("zimage_train", "report"), autoescape=select_autoescape(default=True), trim_blocks=True
)


def render_html(template: str, /, **values: Any) -> str:
    """The page that the `template` makes of `values`."""
    return _environment.get_template(template).render(**values)
