"""The documentation's pages that the playground leads to: shown by itself, so that it needs no other site."""

from __future__ import annotations

import posixpath
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
#: Ends a page that names files which the playground does not show.
ELSEWHERE = "*Files below docs/, recipes/ and src/ are in the repository of flux-attention.*"


def documents() -> dict[str, tuple[str, str]]:
    """Return the pages that there are: by address, name and Markdown."""
    found = {}
    for address, (name, file) in PAGES.items():
        for path in (place / file for place in PLACES):
            if path.is_file():
                found[address] = (name, _by_itself(path.read_text(encoding="utf-8"), file))
                break
    return found


def _by_itself(text: str, file: str) -> str:
    """Turn a page's links: to pages that the playground has into links to these, to others into the names of files."""
    addresses = {Path(file).name: address for address, (_, file) in PAGES.items()}
    named = []

    def link(match: re.Match) -> str:
        words, target = match.groups()
        if re.match(r"https?:", target):
            return match[0]
        path = target.partition("#")[0]
        if address := addresses.get(Path(path).name):
            return f"[{words}](/{address})"
        named.append(posixpath.normpath(posixpath.join("docs", posixpath.dirname(file), path)))
        return f"`{named[-1]}`" if named[-1].endswith(words) else f"{words} (`{named[-1]}`)"

    text = re.sub(r"(?<!!)\[([^\]]+)\]\(([^)\s]+)\)", link, text)
    return f"{text.rstrip()}\n\n{ELSEWHERE}\n" if named else text
