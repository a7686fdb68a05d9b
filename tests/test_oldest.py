"""What `make test-oldest` tests with is what pyproject.toml allows."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
#: Tools for tests, and what has an environment of its own.
OTHERS = {"ruff", "ty", "hatchling", "hypothesis", "triton", "torchao", "bitsandbytes", "vllm", "tensorboard", "gradio"}


def test_the_oldest_versions_are_those_of_pyproject():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("[project.scripts]")[0]
    lowest = dict(re.findall(r'"([\w.-]+)>=([\d.]+)', project.partition("dependencies = [")[2]))
    lowest = {name: version for name, version in lowest.items() if not re.match(r"pytest|mkdocs|nb|ipy", name)}
    tested = dict(re.findall(r"^([\w.-]+)==([\d.]+)$", (ROOT / "tests/oldest.txt").read_text(encoding="utf-8"), re.M))
    assert {"torch", "transformers"} <= set(lowest)
    for name in set(lowest) - OTHERS:
        assert [*tested[name].split("."), "0", "0"][:3] == [*lowest[name].split("."), "0", "0"][:3], name
