"""The documentation's pages that the playground leads to: shown by itself, so that it needs no other site."""

from __future__ import annotations

import re
from pathlib import Path

#: Each page's address and name, and where it is below docs/.
PAGES = {
    "serve": ("Serve a model", "start/serve.md"),
    "calibrate": ("Calibrate", "calibration.md"),
    "train": ("Train routers", "start/train.md"),
    "glossary": ("Glossary", "glossary.md"),
}
#: Where docs/ is: in the package that was built, or in a checkout.
PLACES = (Path(__file__).parent / "docs", Path(__file__).parents[3] / "docs")


def documents() -> dict[str, tuple[str, str]]:
    """Return the pages that there are: by address, name and Markdown."""
    found = {}
    for address, (name, file) in PAGES.items():
        for path in (place / file for place in PLACES):
            if path.is_file():
                found[address] = (name, _by_itself(path.read_text(encoding="utf-8")))
                break
    return found


def _by_itself(text: str) -> str:
    """Turn links to pages that the playground has into links to these, and other links within docs/ into text."""
    addresses = {Path(file).name: address for address, (_, file) in PAGES.items()}

    def link(match: re.Match) -> str:
        words, target = match.groups()
        if re.match(r"https?:", target):
            return match[0]
        address = addresses.get(Path(target.partition("#")[0]).name)
        return f"[{words}](/{address})" if address else words

    return re.sub(r"(?<!!)\[([^\]]+)\]\(([^)\s]+)\)", link, text)
