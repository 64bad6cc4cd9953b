"""For mkdocs: links to files of the repository that are not pages of the site become plain text."""

import re
from typing import Any


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    return re.sub(r"\[([^\]]+)\]\(\.\./[^)]+\)", r"\1", markdown)
