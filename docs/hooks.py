"""Shows pages without the markers between which `bench/tables.py` puts numbers."""

import re


def on_page_markdown(markdown: str, **_) -> str:
    return re.sub(r"^<!-- /?\w+ -->\n?", "", markdown, flags=re.M)
