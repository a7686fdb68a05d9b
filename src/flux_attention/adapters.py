"""Adapters hold routers or a fixed set of layers, on disk and on the Hub.

They are ``flux_config.json``, where there are routers ``routers.safetensors``, and a model card.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, ModelCard, ModelCardData, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from flux_attention import __version__
from flux_attention.config import BaseModel, FluxConfig
from flux_attention.errors import AdapterError, FluxConfigError
from flux_attention.files import replacing
from flux_attention.names import GGUF_MARK, NAME, adapter_path, check_folder, known_rankings, unreachable
from flux_attention.patterns import full_pattern, sparse_pattern
from flux_attention.patterns.base import MAX_TOKENS
from flux_attention.router import LayerRouter

CONFIG_FILE = "flux_config.json"
WEIGHTS_FILE = "routers.safetensors"
CARD_FILE = "README.md"
#: What stands in a card for the adapter's path or id, until it has one.
PLACE = "path-or-hub-id"
CARD_TEMPLATE = Path(__file__).with_name("adapter_card.md.jinja")


def save(directory: str | os.PathLike, config: FluxConfig, routers: nn.ModuleDict, dtype: torch.dtype | None = None):
    """
    Write an adapter.

    A full disk or an interrupt while writing leaves a former adapter as it was. A model card is written where there is
    none: one that is there may say more.

    Parameters
    ----------
    directory : path
        Made if missing.
    config : FluxConfig
        With ``base_model``.
    routers : torch.nn.ModuleDict
        By layer index; empty where ``config`` has a ranking.
    dtype : torch.dtype, optional
        Of the weights on disk; default as they are (float32). bfloat16 halves the file and rounds the weights.
    """
    directory = Path(directory)
    weights = {
        name: tensor.detach().cpu().to(dtype or tensor.dtype).contiguous()
        for name, tensor in routers.state_dict().items()
    }
    if config.ranking is not None:
        with replacing(directory / CONFIG_FILE) as config_file:
            config.to_json(config_file)
        (directory / WEIGHTS_FILE).unlink(missing_ok=True)  # of a former adapter
    else:
        with replacing(directory / WEIGHTS_FILE) as weights_file, replacing(directory / CONFIG_FILE) as config_file:
            save_file(weights, weights_file, metadata={"format": "pt"})
            config.to_json(config_file)
    if not (directory / CARD_FILE).exists():
        card(config).save(directory / CARD_FILE)


def card(config: FluxConfig, model_arguments: dict[str, Any] | None = None, place: str = PLACE) -> ModelCard:
    """
    Make the model card of an adapter: what it is for, its pattern and sizes, how to use it, and its limits.

    Parameters
    ----------
    config : FluxConfig
        With ``base_model``, which ``attach`` fills in.
    model_arguments : dict, optional
        What the base model's ``from_pretrained`` takes besides its name, for example a longer context.
    place : str
        Where the adapter will be found.

    Raises
    ------
    AdapterError
        Without ``base_model``.
    """
    base = config.base_model
    if base is None:
        raise AdapterError("a model card names the base model, and this configuration has none; attach() fills it in")
    try:
        validate_repo_id(base.name)
    except HFValidationError:  # a path, which the Hub refuses in a card's metadata
        on_hub = False
    else:
        on_hub = not Path(base.name).exists()
    data = ModelCardData(
        base_model=base.name if on_hub else None,
        library_name="flux-attention",
        pipeline_tag="text-generation",
        tags=["flux-attention", "adapter", "sparse-attention", "long-context", "kv-cache"],
    )
    own = base.name == NAME
    arguments = ["BACKBONE" if own else repr(base.name)]
    arguments += [f"{key}={value!r}" for key, value in (model_arguments or {}).items()]
    units = len(base.routed_layers) * (1 if config.granularity == "layer" else base.num_kv_heads)
    return ModelCard.from_template(
        data,
        template_path=str(CARD_TEMPLATE),
        config=config,
        base=base,
        units=units,
        shipped=own,
        gguf=base.name.endswith(GGUF_MARK),
        arguments=arguments,
        place=place,
        version=__version__,
        kept=sparse_pattern(config).kept(MAX_TOKENS),
    )


class AdapterMixin:
    """
    Saves and uploads the adapter of an object with ``config`` and ``routers``.

    Attributes
    ----------
    source : Path or None
        The folder that it was loaded from.
    """

    config: FluxConfig
    routers: nn.ModuleDict
    source: Path | None = None

    def save_pretrained(self, directory: str | os.PathLike, dtype: torch.dtype | None = None) -> None:
        """Write the adapter; see ``adapters.save``."""
        save(directory, self.config, self.routers, dtype)

    # Not transformers' PushToHubMixin: it uploads a card of a transformers model in place of the adapter's own.
    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Upload layer routers",
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
    ) -> str:
        """
        Upload the adapter to the Hugging Face Hub, making the repository if needed.

        The card is that of the folder that the adapter was loaded from, with the files that it shows, as training and
        calibration write them; of routers that are others by now it is a new one. A card that is on the Hub already
        stays. The parameters are those of transformers' ``push_to_hub``.

        Returns
        -------
        str
            The commit's address.
        """
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/pr"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        described = api.file_exists(repo_id, CARD_FILE, revision=revision)
        with tempfile.TemporaryDirectory() as directory:
            self._describe(Path(directory), repo_id)
            self.save_pretrained(directory)
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=directory,
                commit_message=commit_message,
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
                ignore_patterns=CARD_FILE if described else None,
            )
        return str(commit)

    def _describe(self, directory: Path, repo_id: str) -> None:
        """Write the card into ``directory``, with what it shows."""
        if self.source is None or not (self.source / CARD_FILE).is_file() or not self._is_as_in(self.source):
            card(self.config, place=repo_id).save(directory / CARD_FILE)
            return
        text = (self.source / CARD_FILE).read_text(encoding="utf-8")
        (directory / CARD_FILE).write_text(text.replace(PLACE, repo_id), encoding="utf-8")
        for name in set(re.findall(r"\]\(([\w.-]+)\)", text)):
            if (self.source / name).is_file():
                shutil.copy(self.source / name, directory)

    def _is_as_in(self, folder: Path) -> bool:
        """Whether a folder holds this very adapter; ``base_model`` has the name that the model has here."""
        try:
            config = FluxConfig.from_json(folder / CONFIG_FILE)
            weights = load_file(folder / WEIGHTS_FILE) if config.ranking is None else {}
        except (FluxConfigError, SafetensorError, OSError):
            return False
        mine = self.routers.state_dict()
        return (
            replace(config, base_model=None) == replace(self.config, base_model=None)
            and set(weights) == set(mine)
            and all(torch.equal(weights[name].float(), mine[name].detach().float().cpu()) for name in mine)
        )


def resolve(path_or_id: str | os.PathLike, revision: str | None = None) -> Path:
    """
    Find the local directory of an adapter: the path itself, that of one that comes along, or a download of the Hub
    repository.

    Raises
    ------
    AdapterError
        If there is neither; the Hub is not asked about what can only be a path.
    """
    name = str(path_or_id)
    path = Path(adapter_path(name)).expanduser()
    if path.is_dir():
        return path
    try:
        check_folder(path_or_id)
    except ValueError as error:
        raise AdapterError(
            f"{error}; expected {CONFIG_FILE} there, and {WEIGHTS_FILE} unless that holds a ranking"
        ) from None
    if reason := unreachable(name, CONFIG_FILE, revision):
        raise AdapterError(
            f"{path_or_id!r} is neither a directory nor a Hub repository that can be reached ({reason}); these come "
            f"along: shipped, {', '.join(known_rankings())}"
        )
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=[CONFIG_FILE, WEIGHTS_FILE]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise AdapterError(
            f"{path_or_id!r} is neither a directory nor a Hub repository that can be reached ({reason})"
        ) from None


def load_config(path_or_id: str | os.PathLike, revision: str | None = None) -> tuple[Path, FluxConfig]:
    """Find an adapter's directory, and read its configuration."""
    directory = resolve(path_or_id, revision)
    _check_there(directory, CONFIG_FILE)
    try:
        config = FluxConfig.from_json(directory / CONFIG_FILE)
        sparse_pattern(config), full_pattern(config)
    except FluxConfigError as error:
        raise AdapterError(str(error)) from None
    if config.base_model is None:
        raise AdapterError(f"{directory / CONFIG_FILE} names no base_model, so it cannot be checked against the model")
    if config.ranking is None:
        _check_there(directory, WEIGHTS_FILE)
    return directory, config


def _check_there(directory: Path, name: str) -> None:
    if not (directory / name).is_file():
        raise AdapterError(
            f"{directory} has no {name}; expected an adapter: {CONFIG_FILE} and, unless that holds a ranking of "
            f"layers, {WEIGHTS_FILE}"
        )


def check_base_model(config: FluxConfig, base_model: BaseModel, where: str = "here") -> None:
    """
    Refuse a configuration that was made for another model, or a ranking that is not of its routed layers.

    Raises
    ------
    AdapterError
        With all that differs.
    """
    made_for = config.base_model
    if made_for is not None and (differences := made_for.differences(base_model)):
        what, verb = ("routers", "were") if config.ranking is None else ("ranking of layers", "was")
        raise AdapterError(
            f"the {what} in {where} {verb} made for {made_for.name}, not for {base_model.name}: "
            + "; ".join(differences)
        )
    if config.ranking is not None and sorted(config.ranking) != sorted(base_model.routed_layers):
        raise AdapterError(
            f"the ranking in {where} is {list(config.ranking)}, expected each routed layer of {base_model.name} once: "
            f"{list(base_model.routed_layers)}"
        )


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
        In float32; empty where the adapter is a ranking of layers.

    Raises
    ------
    AdapterError
        If a file is missing, truncated or not what it should be; if weights are missing, unknown, of another shape,
        or not finite; if the adapter was made for another model.
    """
    directory, config = load_config(path_or_id, revision)
    check_base_model(config, base_model, str(directory))
    config = replace(config, base_model=base_model)
    if config.ranking is not None:
        return config, nn.ModuleDict()
    path = directory / WEIGHTS_FILE
    try:
        weights = load_file(path)
    except (SafetensorError, OSError) as error:
        raise AdapterError(
            f"{path} cannot be read ({error}); the file may be truncated: copy or download it again"
        ) from None
    routers = nn.ModuleDict(
        {str(index): LayerRouter(base_model.head_dim, config.budget is not None) for index in base_model.routed_layers}
    )
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
    return config, routers
