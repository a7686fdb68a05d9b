"""Result files say what was measured, where, and with which versions."""

from __future__ import annotations

import datetime
import json
import os
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from flux_attention.files import replacing

#: The facts of a row that say what was measured.
MEASURED = (
    "shape", "seq_len", "batch", "phase", "engine", "method", "sparsity", "full", "queries", "measure",
    "output_tokens",
)  # fmt: skip


def environment() -> dict[str, Any]:
    """Describe device, versions, commit and date. ``FLUX_COMMIT`` names the commit outside a checkout."""

    def version_of(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    commit = os.environ.get("FLUX_COMMIT")
    if commit is None:
        here = Path(__file__).parent
        try:
            commit = subprocess.run(
                ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True
            ).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            commit = None
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "transformers": version_of("transformers"),
        "commit": commit,
        "date": datetime.date.today().isoformat(),
    }


def earlier_rows(path: str | Path) -> list[dict[str, Any]]:
    """Read the rows in a file of an earlier call, if that was on this device at this commit; else none."""
    try:
        before, now = json.loads(Path(path).read_text(encoding="utf-8")), environment()
    except (FileNotFoundError, ValueError):  # ValueError: damaged
        return []
    if any(before["meta"].get(fact) != now[fact] for fact in ("device", "commit")):
        return []
    return before["rows"]


def begun_rows(
    path: str | Path,
    settings: dict[str, Any],
    reasons: Mapping[str, str] = MappingProxyType({}),
    remedy: str = "use another folder, or --restart",
) -> list[dict[str, Any]]:
    """
    Read the rows that a run with these settings has left, if any; those of another commit name it.

    ``reasons`` say of settings that do not explain themselves why they may have changed, ``remedy`` what to do.

    Raises
    ------
    ValueError
        If the file is damaged or holds results of other settings.
    """
    try:
        before = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(before, dict) or not isinstance(before.get("meta"), dict) or "rows" not in before:
            raise ValueError("it has no meta and rows")
    except FileNotFoundError:
        return []
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): {remedy}") from None
    changed = sorted(key for key in settings if before["meta"].get("settings", {}).get(key) != settings[key])
    if changed:
        why = "".join(f". {key}: {reasons[key]}" for key in changed if key in reasons)
        raise ValueError(f"{path} holds results of other settings ({', '.join(changed)}): {remedy}{why}")
    commit = before["meta"].get("commit")
    if commit != environment()["commit"]:  # the file's will be this one
        return [{"commit": commit, **row} for row in before["rows"]]
    return before["rows"]


def merged(before: list[dict[str, Any]], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Put ``rows`` behind those of ``before`` that were not measured again, against whatever baseline."""

    def measured(row):
        return tuple(row.get(fact) for fact in MEASURED)

    again = {measured(row) for row in rows}
    return [row for row in before if measured(row) not in again] + rows


def write_results(path: str | Path, rows: list[dict[str, Any]], **meta: Any) -> None:
    """Write ``{"meta": …, "rows": […]}`` to ``path``, a line each row; ``meta`` adds to ``environment()``."""
    lines = ",\n".join(json.dumps(row) for row in rows)
    text = f'{{"meta": {json.dumps({**environment(), **meta}, indent=1)},\n"rows": [\n{lines}\n]}}\n'
    with replacing(path) as file:
        file.write_text(text, encoding="utf-8")
