"""Draws routes and savings as HTML for notebooks, in the colours of the pages' figures, on light and on dark ground.

Nothing is fetched. Colours are variables with a fallback beside each use, as some viewers take styles away.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

#: Full, sparse; as in the figures of README and docs.
LIGHT, DARK = ("#d1480d", "#9ec5ea"), ("#f47d43", "#2f5f8f")
#: How notebooks say that they are dark: by the system, JupyterLab, VS Code; Colab and pages by the root's attribute.
DARK_GROUNDS = (
    'body[data-jp-theme-light="false"] .flux-attention',
    "body.vscode-dark .flux-attention",
    "body.vscode-high-contrast .flux-attention",
    "html[theme=dark] .flux-attention",
    "html[data-theme=dark] .flux-attention",
)
LIGHT_GROUNDS = ('body[data-jp-theme-light="true"] .flux-attention', "body.vscode-light .flux-attention")


def _variables(colours: tuple[str, str]) -> str:
    return f"{{--flux-full:{colours[0]};--flux-sparse:{colours[1]}}}"


STYLE = (
    f"<style>.flux-attention{_variables(LIGHT)}"
    f"@media (prefers-color-scheme:dark){{.flux-attention{_variables(DARK)}}}"
    f"{','.join(LIGHT_GROUNDS)}{_variables(LIGHT)}{','.join(DARK_GROUNDS)}{_variables(DARK)}</style>"
)
FULL, SPARSE = (f"var(--flux-{name},{colour})" for name, colour in zip(("full", "sparse"), LIGHT, strict=True))
CELL = "display:inline-block;width:.9em;height:1.1em;margin-right:2px;border-radius:2px;vertical-align:-.2em"
FAINT = "color-mix(in srgb,currentColor 45%,transparent)"
BAR = f"display:inline-block;width:16em;height:.8em;border:1px solid {FAINT}"


def frame(*parts: str) -> str:
    """Put parts below each other, in the notebook's own font and ink."""
    return f'{STYLE}<div class="flux-attention" style="line-height:1.6">{"".join(parts)}</div>'


def line(words: str) -> str:
    """Write a line of text."""
    return f"<div>{escape(words, quote=False)}</div>"


def strip(full: Sequence[bool], titles: Sequence[str], words: str) -> str:
    """Draw a cell for each layer, with what a pointer on it is told, and words behind them, which also say it all."""
    cells = "".join(
        f'<span style="{CELL};background:{FULL if is_full else SPARSE}" title="{escape(title)}"></span>'
        for is_full, title in zip(full, titles, strict=True)
    )
    return f'<div><span role="img" aria-label="{escape(words)}">{cells}</span> {escape(words)}</div>'


def bar(name: str, share: float, words: str) -> str:
    """Draw a share of what dense takes."""
    filled = f"display:block;height:100%;width:{100 * min(1.0, share):.1f}%;background:{FAINT}"
    label = "display:inline-block;width:11em"
    return (
        f'<div><span style="{label}">{escape(name)}</span><span style="{BAR}" title="{100 * share:.0f} % of dense">'
        f'<span style="{filled}"></span></span> {escape(words)}</div>'
    )


def legend() -> str:
    """Say which colour is which."""
    names = {"full attention": FULL, "sparse: sink and window": SPARSE}
    keys = (
        f'<span style="{CELL};background:{colour}"></span><span style="opacity:.75">{name}</span>'
        for name, colour in names.items()
    )
    return f'<div style="font-size:.9em">{"&emsp;".join(keys)}</div>'
