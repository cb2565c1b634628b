"""Pages from templates: one style, one file, nothing from a network, and every name shown as text."""

import base64
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

# Okabe and Ito's colours, which most colour-blind people tell apart, darker on white and lighter on black.
COLOURS = ("#0060a0", "#b84a00", "#00745a", "#a3387a", "#7a6a00", "#2a7fb8", "#555555", "#a01010")
LIGHTER = ("#6cb8f0", "#ff9a4d", "#3fd0a5", "#f08cc8", "#e6d84a", "#9ad4ff", "#bbbbbb", "#ff8080")

_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).with_name("templates")),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def render(template: str, **values: Any) -> str:
    """Fill in a template of the folder `templates`; text is escaped, but for what is `markupsafe.Markup`."""
    page = _TEMPLATES.get_template(template).render(colours=(COLOURS, LIGHTER), **values)
    return page.encode("utf-8", "backslashreplace").decode()  # names of files may be of any bytes


def to_base64(content: bytes) -> str:
    """Encode a file that lies inside a page."""
    return base64.b64encode(content).decode()


def percent(share: float) -> str:
    """Write a share as a percentage of three digits."""
    return f"{100 * share:.3g}\N{NO-BREAK SPACE}%"


def signed(value: float) -> str:
    """Write a difference with its sign, and zero without."""
    text = f"{value:+.3f}".replace("-", "\N{MINUS SIGN}")
    return text if float(text[1:]) else text[1:]


_TEMPLATES.filters |= {"percent": percent, "signed": signed}
