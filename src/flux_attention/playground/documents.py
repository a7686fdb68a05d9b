"""The documentation's pages that the playground leads to: shown by itself, so that it needs no other site."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

#: Each page's address and name, and where it is below docs/; built packages hold them, too.
PAGES = {
    "serve": ("Serve a model", "start/serve.md"),
    "calibrate": ("Calibrate", "calibration.md"),
    "train": ("Train routers", "start/train.md"),
    "glossary": ("Glossary", "glossary.md"),
    "guide": ("Guide", "guide.md"),
    "performance": ("Speed and memory", "performance.md"),
    "evaluation": ("Evaluate", "evaluation.md"),
    "training": ("Training", "training.md"),
    "serving": ("Serving", "serving.md"),
}
#: Those that stand at the top of each page; a link leads to the others.
IN_MENU = ("serve", "calibrate", "train", "glossary", "guide")
#: Where docs/ is: in the package that was built, or in a checkout.
PLACES = (Path(__file__).parent / "docs", Path(__file__).parents[3] / "docs")
#: Ends a page that names files which the playground does not show.
ELSEWHERE = "*Files below docs/, recipes/, src/ and benchmarks/ are in the repository of flux-attention.*"


def documents() -> dict[str, tuple[str, str]]:
    """Return the pages that there are: by address, name and Markdown."""
    found = {}
    for address, (_, file) in PAGES.items():
        paths = [place / file for place in PLACES if (place / file).is_file()]
        if paths:
            found[address] = paths[0].read_text(encoding="utf-8")
    addresses = {PAGES[address][1]: address for address in found}
    return {
        address: (PAGES[address][0], _by_itself(text, PAGES[address][1], addresses)) for address, text in found.items()
    }


def _by_itself(text: str, file: str, addresses: dict[str, str]) -> str:
    """Turn a page's links: to pages that the playground has into links to these, to others into the names of files."""
    named = []

    def link(match: re.Match) -> str:
        words, target = match.groups()
        if re.match(r"https?:", target):
            return match[0]
        path = target.partition("#")[0]
        if not path:  # to a heading of the same page: these have no addresses here
            return words
        path = posixpath.normpath(posixpath.join(posixpath.dirname(file), path))
        if address := addresses.get(path):
            return f"[{words}](/{address})"
        named.append(posixpath.normpath(posixpath.join("docs", path)))
        return f"`{named[-1]}`" if named[-1].endswith(words) else f"{words} (`{named[-1]}`)"

    for name, target in re.findall(r"^\[([^\]]+)\]: (\S+)$", text, re.M):
        text = text.replace(f"][{name}]", f"]({target})").replace(f"[{name}]: {target}\n", "")
    text = re.sub(r"!?\[([^\]]+)\]\(([^)\s]+)\)", link, text)  # images, too, are files that are not here
    return f"{text.rstrip()}\n\n{ELSEWHERE}\n" if named else text
