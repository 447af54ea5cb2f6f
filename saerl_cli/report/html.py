"""Pages of plain HTML: the templates of `web/`, each with the one style sheet inside it."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

WEB = Path(__file__).parent / "web"


def render(template: str, **values: Any) -> str:
    """Fill a template; what a model or a text wrote is escaped.

    Args:
        template: a file of `web/`, which extends `base.html`.
        values: what it shows; `title` is always needed.
    """
    environment = Environment(loader=FileSystemLoader(WEB), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    text = environment.get_template(template).render(css=(WEB / "page.css").read_text("utf-8"), **values)
    return text.encode("utf-8", "replace").decode()  # half a surrogate pair, which a tokenizer may give
