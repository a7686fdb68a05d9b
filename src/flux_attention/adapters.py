"""Routers on disk and on the Hub: a directory with ``flux_config.json`` and ``routers.safetensors``."""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from flux_attention.config import BaseModel, FluxConfig, FluxConfigError
from flux_attention.names import check_folder, unreachable
from flux_attention.router import LayerRouter

CONFIG_FILE = "flux_config.json"
WEIGHTS_FILE = "routers.safetensors"


class AdapterError(ValueError):
    """An adapter that cannot be used: missing, damaged, or made for another model; the message says which."""


def save(directory: str | os.PathLike, config: FluxConfig, routers: nn.ModuleDict, dtype: torch.dtype | None = None):
    """
    Write an adapter.

    Each file is written beside its place first: a full disk or an interrupt while writing leaves a former adapter as
    it was.

    Parameters
    ----------
    directory : path
        Made if missing.
    config : FluxConfig
        With ``base_model``.
    routers : torch.nn.ModuleDict
        By layer index.
    dtype : torch.dtype, optional
        Of the weights on disk; default as they are (float32). bfloat16 halves the file and rounds the weights.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    weights = {
        name: tensor.detach().cpu().to(dtype or tensor.dtype).contiguous()
        for name, tensor in routers.state_dict().items()
    }
    with tempfile.TemporaryDirectory(dir=directory, prefix=".saving-") as scratch:
        save_file(weights, Path(scratch) / WEIGHTS_FILE, metadata={"format": "pt"})
        config.to_json(Path(scratch) / CONFIG_FILE)
        for name in (WEIGHTS_FILE, CONFIG_FILE):
            os.replace(Path(scratch) / name, directory / name)


def push_to_hub(
    repo_id: str, config: FluxConfig, routers: nn.ModuleDict, *, private: bool | None = None, token: str | None = None
) -> str:
    """
    Upload an adapter to the Hugging Face Hub, making the repository if needed.

    Returns
    -------
    str
        The commit's address.
    """
    api = HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        save(directory, config, routers)
        return str(api.upload_folder(repo_id=repo_id, folder_path=directory, commit_message="Upload layer routers"))


def _resolve(path_or_id: str | os.PathLike, revision: str | None = None) -> Path:
    """The local directory of an adapter: the path itself, or a download of the Hub repository of that id."""
    path = Path(path_or_id)
    if path.is_dir():
        return path
    if path.exists():
        raise AdapterError(f"{path} is a file; expected a directory with {CONFIG_FILE} and {WEIGHTS_FILE}")
    try:
        check_folder(path_or_id)
    except ValueError as error:
        raise AdapterError(str(error)) from None
    if reason := unreachable(str(path_or_id), CONFIG_FILE, revision):
        raise AdapterError(f"{path_or_id!r} is neither a directory nor a Hub repository that can be reached ({reason})")
    try:
        return Path(snapshot_download(str(path_or_id), revision=revision, allow_patterns=[CONFIG_FILE, WEIGHTS_FILE]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise AdapterError(
            f"{path_or_id!r} is neither a directory nor a Hub repository that can be reached ({reason})"
        ) from None


def load_config(path_or_id: str | os.PathLike, revision: str | None = None) -> tuple[Path, FluxConfig]:
    """The directory and the configuration of an adapter."""
    directory = _resolve(path_or_id, revision)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (directory / name).is_file():
            raise AdapterError(f"{directory} has no {name}; expected an adapter: {CONFIG_FILE} and {WEIGHTS_FILE}")
    try:
        config = FluxConfig.from_json(directory / CONFIG_FILE)
    except FluxConfigError as error:
        raise AdapterError(str(error)) from None
    if config.base_model is None:
        raise AdapterError(f"{directory / CONFIG_FILE} names no base_model, so it cannot be checked against the model")
    return directory, config


def load(
    path_or_id: str | os.PathLike, base_model: BaseModel, revision: str | None = None
) -> tuple[FluxConfig, nn.ModuleDict]:
    """
    Read an adapter made for the model ``base_model``.

    Returns
    -------
    config : FluxConfig
        With ``base_model`` as given: the name is that of the model at hand.
    routers : torch.nn.ModuleDict
        In float32.

    Raises
    ------
    AdapterError
        If a file is missing, truncated or not what it should be; if weights are missing, unknown, of another shape,
        or not finite; if the adapter was made for another model.
    """
    directory, config = load_config(path_or_id, revision)
    differences = config.base_model.differences(base_model)
    if differences:
        raise AdapterError(
            f"the routers in {directory} were made for {config.base_model.name}, not for {base_model.name}: "
            + "; ".join(differences)
        )
    path = directory / WEIGHTS_FILE
    try:
        weights = load_file(path)
    except (SafetensorError, OSError) as error:
        raise AdapterError(
            f"{path} cannot be read ({error}); the file may be truncated: copy or download it again"
        ) from None
    routers = nn.ModuleDict({str(index): LayerRouter(base_model.head_dim) for index in base_model.routed_layers})
    expected = routers.state_dict()
    missing, unknown = sorted(set(expected) - set(weights)), sorted(set(weights) - set(expected))
    if missing or unknown:
        raise AdapterError(f"{path} does not fit: missing weights {missing[:4]}, unknown weights {unknown[:4]}")
    for name, tensor in weights.items():
        if tensor.shape != expected[name].shape:
            raise AdapterError(
                f"{path}: {name} has shape {tuple(tensor.shape)}, expected {tuple(expected[name].shape)}"
            )
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise AdapterError(f"{path}: {name} holds NaN, infinity or no floating-point numbers; the file is damaged")
    routers.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    return replace(config, base_model=base_model), routers
