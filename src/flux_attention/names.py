"""Tells what the name of a model or an adapter stands for: one that comes along, a folder or a Hub repository."""

from __future__ import annotations

import os
from difflib import get_close_matches
from pathlib import Path

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError

#: Seconds that the Hub has for its answer.
TIMEOUT = 10

#: What the model that comes along is called in results and adapters, wherever it lies.
NAME = "flux-attention/shipped"
#: What stands behind the name of a model from a GGUF file: no Hub repository can be called so.
GGUF_MARK = " (GGUF)"
#: Stock transformers checkpoint with its tokenizer.
BACKBONE = Path(__file__).parent / "shipped" / "backbone"
#: Router adapter for it.
ROUTERS = Path(__file__).parent / "shipped" / "routers"
#: Calibrated adapters of the Hub's models, in folders that are called as those are, without their owner; some with the
#: length behind it at which they were calibrated, where that is another than ``calibrate`` takes by default.
RANKINGS = Path(__file__).parent / "shipped" / "rankings"


def model_path(model: str) -> str:
    """Say where the model called ``shipped`` lies; any other name as it is."""
    return str(BACKBONE) if model == "shipped" else model


def model_name(model: str) -> str:
    """Say what the model called ``shipped`` is called in results and adapters; any other name as it is."""
    return NAME if model == "shipped" else model


def adapter_path(adapter: str) -> str:
    """Say where an adapter that comes along lies, ``shipped`` or one of ``RANKINGS``; any other name as it is."""
    if adapter == "shipped":
        return str(ROUTERS)
    # A folder here of that name is most likely the model: only an adapter goes before ours.
    if adapter in known_rankings() and not (Path(adapter) / "flux_config.json").exists():
        return str(RANKINGS / adapter)
    return adapter


def known_rankings() -> list[str]:
    """List the models whose calibrated adapters come along."""
    return sorted(folder.name for folder in RANKINGS.iterdir())


def looks_like_path(name: str) -> bool:
    """Whether ``name`` can only be a folder: ids of Hub repositories are ``name`` or ``owner/name``."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith("/") or "\\" in name


def check_folder(name: str | os.PathLike) -> None:
    """
    Refuse a path at which there is no folder; ids of Hub repositories pass.

    Raises
    ------
    ValueError
        With what is there.
    """
    path, text = Path(name).expanduser(), str(name)
    if path.is_dir():
        return
    if path.exists():
        raise ValueError(f"{text} is a file, expected a folder")
    if isinstance(name, os.PathLike) or looks_like_path(text):
        raise ValueError(f"no such folder {text}; check the path, or give the id of a Hub repository: owner/name")


def is_gguf(name: str | os.PathLike) -> bool:
    """Whether ``name`` is that of a GGUF file: by its ending or, as other programs store them, by its first bytes."""
    path = Path(name).expanduser()
    if path.is_file() and path.suffix.lower() != ".gguf":
        with path.open("rb") as file:
            return file.read(4) == b"GGUF"
    return path.suffix.lower() == ".gguf" and not path.is_dir()


def check_model(name: str) -> str | None:
    """
    Say why a model cannot be had; None if it is a folder, a GGUF file or a repository that can be reached.

    Raises
    ------
    ValueError
        For a path at which there is neither a folder nor a GGUF file.
    """
    path = Path(name).expanduser()
    if is_gguf(name):
        if not path.is_file():
            raise ValueError(f"no such file {name}; check the path")
        return None
    if path.is_file():
        raise ValueError(f"{name} is a file, but not a GGUF file; expected a folder, a GGUF file or a Hub id")
    check_folder(name)
    return None if path.is_dir() else unreachable(name, "config.json")


def unreachable(repo_id: str, filename: str, revision: str | None = None) -> str | None:
    """
    Say why a Hub repository cannot be had; None if it lies in the cache or the Hub has it.

    One request, for a download would retry for half a minute before it says so.
    """
    try:
        if isinstance(try_to_load_from_cache(repo_id, filename, revision=revision), str):
            return None
        if constants.HF_HUB_OFFLINE:
            return f"it is not in the cache, and HF_HUB_OFFLINE forbids downloads{_meant(repo_id)}"
        get_hf_file_metadata(hf_hub_url(repo_id, filename, revision=revision), timeout=TIMEOUT)
    except HFValidationError:
        return "no such folder, and not the id of a Hub repository: owner/name"
    except GatedRepoError:
        return "its owner grants access on request: ask at its page, then log in by `hf auth login`"
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in (401, 404):
            private = f"the Hub has no such repository with a {filename}, or it is private"
            return f"no such folder, and {private}{_meant(repo_id)}"
        return f"the Hub answered {status}"
    except Exception as error:  # of the HTTP library, which differs between versions of huggingface_hub
        return f"no such folder, and the Hub cannot be reached: {type(error).__name__}{_meant(repo_id)}"
    return None


def _meant(name: str) -> str:
    """Ask whether something that comes along was meant; say what it is if it is a ranking in a model's place."""
    if name in known_rankings():
        return f"; {name} comes along as an adapter: the model is a folder of yours, or its Hub id with the owner"
    found = get_close_matches(name, ["shipped", *known_rankings()], 1)
    return f"; did you mean {found[0]}?" if found else ""
