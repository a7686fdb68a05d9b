"""Examples of the pages, and what stands in a reader's place when they are run."""

import re
from pathlib import Path

from flux_attention.names import BACKBONE

ROOT = Path(__file__).parents[2]
#: The shipped tokenizer has none.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def sections(page):
    """The Python blocks of a page by the heading that they stand under; ``""`` for those above all."""
    found = {"": []}
    for part in re.split(r"^## ", (ROOT / page).read_text(encoding="utf-8"), flags=re.M):
        title = "" if part.startswith("# ") else part.splitlines()[0]
        found[title] = re.findall(r"^```python\n(.*?)^```", part, re.S | re.M)
    return found


def as_a_reader(folder, adapter):
    """Make what a reader has in ``folder``: a chat model and a text; return what puts their names into code."""
    model = folder / "model"
    model.mkdir()
    for path in Path(BACKBONE).iterdir():
        (model / path.name).symlink_to(path)
    (model / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    lines = "\n".join(f"def part_{number}(): return {number}" for number in range(60))
    (folder / "long.txt").write_text(lines, encoding="utf-8")

    def swap(code):
        return code.replace('"Qwen/Qwen3-8B"', repr(str(model))).replace('"path-or-hub-id"', repr(str(adapter)))

    return swap
