"""Finds documented things on the local machine: packages and functions, with what their authors say about them.

Every machine has the functions of the standard library and of NumPy, with the first lines of their docstrings as
summaries and their modules as labels, and the Python packages that this one needs, with their own summaries, licences
and versions. Debian and its kin have hundreds of packages more in ``/var/lib/dpkg/status``, with sections as labels.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from email.message import Message
from email.parser import HeaderParser
from importlib import metadata
from pathlib import Path
from typing import cast

DPKG = Path("/var/lib/dpkg/status")
FUNCTION = re.compile(r'^ *(?:def|class) +([A-Za-z]\w*)[^\n]*?:\n\s+r?"""(.+?)"""', re.DOTALL | re.MULTILINE)
#: Where a docstring's prose ends.
SECTION = re.compile(r"\n[^\n]+\n *---|\n *>>>|\n *\.\. ")
MIN_WORDS = 15
MAX_CHARS = 1200
SUMMARY_WORDS = range(3, 21)


@dataclass(frozen=True)
class Document:
    """
    Holds what is said about one thing.

    Attributes
    ----------
    kind : str
        "package" or "function".
    name : str
        The thing's own name.
    origin : str
        What it belongs to; all of one origin are of one split.
    summary : str
        Its authors' one line about it, which ``text`` does not repeat.
    text : str
        What else they say.
    facts : tuple of (str, str)
        What is known of it: "version", "licence", "maintainer", "module".
    label : str
        The section or the top-level module that it is filed under; empty where there is none.
    """

    kind: str
    name: str
    origin: str
    summary: str
    text: str
    facts: tuple[tuple[str, str], ...]
    label: str = ""

    @property
    def block(self) -> str:
        """The document as it stands in a context, the summary left out."""
        about = "; ".join(f"{name}: {value}" for name, value in self.facts)
        return f"## {self.kind.capitalize()} {self.name}\n\n{about}\n\n{self.text}\n\n"


def _document(kind: str, name: str, origin: str, summary: str, text: str, facts: dict[str, str], label: str = ""):
    """Make a document, or None where there is too little of it."""
    summary, text = " ".join(summary.split()), text.strip()
    text = re.sub(r"\n{3,}", "\n\n", text.replace(summary, "")).strip()
    if len(text) > MAX_CHARS:
        text = text[: max(text.rfind("\n\n", 0, MAX_CHARS), text.rfind(". ", 0, MAX_CHARS) + 1)].rstrip()
    if (
        len(summary.split()) not in SUMMARY_WORDS
        or re.search("[=<>]", summary)
        or len(text.split()) < MIN_WORDS
        or not facts
    ):
        return None
    return Document(kind, name, origin, summary.rstrip("."), text, tuple(facts.items()), label)


def functions(path: str, source: str) -> Iterator[Document]:
    """Yield the documented functions and classes of a source file."""
    module = path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
    for name, docstring in dict(FUNCTION.findall(source)).items():
        summary, _, text = docstring.partition("\n\n")
        prose = SECTION.split(text)[0]  # no lists of parameters, no examples
        lines = "\n".join(line.strip() for line in prose.splitlines())
        document = _document(
            "function", f"{module}.{name}", path, summary, lines, {"module": module}, module.split(".")[0]
        )
        if document:
            yield document


def _paragraphs(description: str) -> str:
    """Join the lines of a Debian description's paragraphs, which a dot alone divides."""
    blocks = re.split(r"\n \.\n", f"\n{description}")
    return "\n\n".join(" ".join(block.split()) for block in blocks)


def debian_packages(status: Path | None = None) -> Iterator[Document]:
    """Yield the packages that dpkg has installed, one of each source package."""
    status = DPKG if status is None else status
    if not status.is_file():
        return
    seen = set()
    for entry in status.read_text(encoding="utf-8", errors="replace").split("\n\n"):
        fields = HeaderParser().parsestr(entry)
        name, description = fields.get("Package", ""), fields.get("Description", "")
        origin = (fields.get("Source") or name).split(" ")[0].removeprefix("python-")
        if origin in seen or not name:
            continue
        summary, _, text = description.partition("\n")
        maintainer = re.sub(r" *<.*", "", fields.get("Maintainer", ""))
        facts = {"version": fields.get("Version", ""), "maintainer": maintainer}
        facts = {key: value for key, value in facts.items() if value}
        section = fields.get("Section", "").rpartition("/")[2]
        document = _document("package", name, origin, summary, _paragraphs(text), facts, section)
        if document:
            seen.add(origin)
            yield document


def python_packages() -> Iterator[Document]:
    """Yield the installed distributions."""
    for found in sorted(metadata.distributions(), key=lambda found: found.name.lower()):
        fields = cast(Message, found.metadata)
        licence = fields.get("License-Expression") or fields.get("License") or ""
        facts = {"version": found.version, "licence": licence if len(licence) < 40 and "\n" not in licence else ""}
        facts = {key: value for key, value in facts.items() if value}
        text = str(fields.get_payload() or fields.get("Description") or "")
        lines = [line for line in text.splitlines() if not re.search(r"https?:|^\s*[|=+*~-]{3}|<|\[!|^\s*\.\.", line)]
        name = found.name.lower()
        document = _document("package", found.name, name, fields.get("Summary") or "", "\n".join(lines), facts)
        if document:
            yield document
