"""Imports the authors' released checkpoints: a stock transformers model folder, and an adapter for it.

A released checkpoint is a whole model with its routers among the weights, under an architecture name that stock
transformers does not know. No code of it is run and nothing is unpickled.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Collection
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic.dataclasses
import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from flux_attention import adapters
from flux_attention.config import BaseModel, FluxConfig
from flux_attention.errors import CheckpointError
from flux_attention.files import check_writable
from flux_attention.hf.support import base_model, find_decoder, full_attention_layers
from flux_attention.names import check_folder, unreachable
from flux_attention.patterns import FULL_PATTERNS, full_pattern, sparse_pattern
from flux_attention.router import LayerRouter
from flux_attention.validation import NO_OTHER_KEYS, Natural, Positive, checked, expected

CONFIG_FILE, WEIGHTS_FILE, INDEX_FILE = "config.json", "model.safetensors", "model.safetensors.index.json"
#: Released architectures: the stock one's name, and its model type.
ARCHITECTURES = {
    "PawQwen3ForCausalLM": ("Qwen3ForCausalLM", "qwen3"),
    "PawLlamaForCausalLM": ("LlamaForCausalLM", "llama"),
}
#: Tokens to which the kernel that they were trained with rounds sink and window.
BLOCK_SIZE = 128
#: Block-sparse prefill as the authors call it.
BLOCK_SPARSE = {"pattern": "block_sparse", "threshold": 0.8, "select": "mass", "from_tokens": 0}
#: What else than configuration and weights a model folder has: tokenizer, chat template, generation settings.
OTHER_FILES = (".json", ".jinja", ".txt", ".model")
#: Where a layer's router lies, and what its parts are called there.
ROUTER = "model.layers.{}.self_attn.mask_allocator."
ROUTER_PARTS = {"encoder": "cls_feat_extractor", "head": "cls_router_head_agnostic"}
#: Parts of names of weights that only their training used.
LEFT_OVERS = {"attn_mask_log_alphas", "sparsity_lambda1_task", "sparsity_lambda2_task", "log_temp"}


@checked(CheckpointError, within=CONFIG_FILE)
@pydantic.dataclasses.dataclass(frozen=True, config=NO_OTHER_KEYS)
class Settings:
    """
    What a released checkpoint's ``config.json`` says beyond a stock model's, in its own words.

    Attributes
    ----------
    toggle_type : str
        What sparse layers compute in prefill.
    retrieval_mode : str
        What full layers compute in prefill.
    sink_size, local_window_size : int
        Tokens of sparse layers.
    pool_size : int
        Tokens at each end of the prompt that routers read.
    pooling_mode, use_softmax
        How routers read and decide; there is one way here.
    triangle_n_last : int, optional
        The prompt's last tokens that see everything, of ``triangle``; not looked at otherwise.

    Raises
    ------
    CheckpointError
        For keys that are missing, and values that cannot be or that this version does not know.
    """

    toggle_type: Annotated[
        Literal["streaming", "triangle", "xattn"], expected("one of ['streaming', 'triangle', 'xattn']")
    ]
    retrieval_mode: Annotated[Literal["full", "xattn"], expected("one of ['full', 'xattn']")]
    sink_size: Natural
    local_window_size: Positive
    pool_size: Positive
    pooling_mode: Annotated[
        Literal["ctx_q"], expected("'ctx_q': routers here read the queries of the prompt's two ends, nothing else")
    ]
    use_softmax: Annotated[
        Literal[True], expected("true: routers here decide by the greater of two logits, not otherwise")
    ]
    triangle_n_last: Any = None

    def config(self, exact: bool, full: str | None) -> FluxConfig:
        """
        Make the adapter's configuration; see ``import_checkpoint``.

        Raises
        ------
        CheckpointError
            For attention that this version does not have.
        """
        sparse = {"pattern": self.toggle_type, "sink": self.sink_size, "window": self.local_window_size}
        if self.toggle_type == "xattn":
            sparse |= BLOCK_SPARSE
        elif self.toggle_type == "triangle":
            if self.triangle_n_last is None:
                raise CheckpointError(f"{CONFIG_FILE} is incomplete: missing keys ['triangle_n_last'] of a triangle")
            sparse["last_n"] = self.triangle_n_last
        if not exact and self.toggle_type != "xattn":
            sparse["block_size"] = BLOCK_SIZE
        retrieval = BLOCK_SPARSE if self.retrieval_mode == "xattn" else {"pattern": "full"}
        config = FluxConfig(
            sparse=sparse, full=retrieval if full is None else {"pattern": full}, pool_size=self.pool_size
        )
        sparse_pattern(config), full_pattern(config)  # a wrong size fails here
        return config


@dataclass(frozen=True)
class Imported:
    """
    What an import has left.

    Attributes
    ----------
    model, adapter : pathlib.Path
        The stock model's folder, and the adapter's.
    config : FluxConfig
        The adapter's.
    ignored : tuple of str
        Weights that were left out: they are of no use at inference.
    """

    model: Path
    adapter: Path
    config: FluxConfig
    ignored: tuple[str, ...]


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies, and its shape."""

    file: Path
    shape: tuple[int, ...]

    def read(self, name: str) -> torch.Tensor:
        with safe_open(self.file, "pt") as opened:
            return opened.get_tensor(name)


def import_checkpoint(
    checkpoint: str | os.PathLike,
    output: str | os.PathLike,
    *,
    revision: str | None = None,
    copy: bool = False,
    exact: bool = False,
    full: str | None = None,
) -> Imported:
    """
    Import a released checkpoint: ``output/model``, a stock transformers model, and ``output/adapter`` for it.

    The model's weights are the checkpoint's, which training may have changed, never those of the model that it
    started from. Either both folders are written or none.

    Parameters
    ----------
    checkpoint : path or str
        Folder or Hub id; its weights are safetensors.
    output : path
        Made if missing; must be empty.
    revision : str, optional
        Branch, tag or commit of a Hub repository.
    copy : bool
        Write the model's own weights to new files. By default the checkpoint's files, with the routers in them, are
        linked to: they have to stay where they are, and transformers lists the routers as unexpected when it loads.
    exact : bool
        Count sink and window in exact tokens, in place of the blocks of 128 that the checkpoint was trained with.
    full : str, optional
        What full layers compute, a name in ``patterns.FULL_PATTERNS``, in place of what the checkpoint says.

    Returns
    -------
    Imported
        The folders, the adapter's configuration, and the weights that were ignored.

    Raises
    ------
    CheckpointError
        If there is no such checkpoint; if it has another architecture, settings or attention that this version does
        not have, weights that are missing, unknown, of another shape, not finite or not safetensors; if ``output``
        holds anything.
    FluxConfigError
        For sizes out of range.
    """
    if full is not None and full not in FULL_PATTERNS:
        raise CheckpointError(f"full is {full!r}, expected one of {list(FULL_PATTERNS)}")
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise CheckpointError(f"{output} is there already and not an empty folder; name another output")
    # The few bytes of the configuration first: what cannot be imported is known before gigabytes are fetched.
    stock, settings = _read_config(_find(checkpoint, [CONFIG_FILE], revision) / CONFIG_FILE)
    config = settings.config(exact, full)
    folder = _find(checkpoint, [f"*{ending}" for ending in (*OTHER_FILES, ".safetensors")], revision)
    places = _read_places(folder)
    check_writable(output)
    with tempfile.TemporaryDirectory(dir=output, prefix=".importing-") as scratch:
        model, adapter = Path(scratch) / "model", Path(scratch) / "adapter"
        model.mkdir()
        (model / CONFIG_FILE).write_text(json.dumps(stock, indent=2) + "\n", encoding="utf-8")
        shapes, tied, base = _describe(model, places)
        base = replace(base, name=str(output / "model"))
        routers, names = _routers(base)
        ignored = _check(places, shapes, {theirs: routers[ours].shape for theirs, ours in names.items()}, tied)
        loaded = _load_routers(base, {ours: places[theirs].read(theirs).float() for theirs, ours in names.items()})
        _write_weights(folder, model, {name: places[name] for name in shapes if name in places}, places, copy)
        adapters.save(adapter, replace(config, base_model=base), loaded)
        for written in (model, adapter):
            os.replace(written, output / written.name)
    return Imported(output / "model", output / "adapter", replace(config, base_model=base), ignored)


def _find(checkpoint: str | os.PathLike, files: list[str], revision: str | None) -> Path:
    """Return the checkpoint's folder: itself, or that of the Hub repository's ``files`` in the cache."""
    path = Path(checkpoint).expanduser()
    if path.is_dir():
        return path
    try:
        check_folder(checkpoint)
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    if reason := unreachable(str(checkpoint), CONFIG_FILE, revision):
        raise CheckpointError(f"the checkpoint {str(checkpoint)!r} cannot be had: {reason}")
    return Path(snapshot_download(str(checkpoint), revision=revision, allow_patterns=files))


def _read_config(path: Path) -> tuple[dict[str, Any], Settings]:
    """Return what a stock model's ``config.json`` holds, and what a released checkpoint's says beside it."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} has no {path.name}; expected a released checkpoint's folder") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); the file may be truncated") from None
    names = values.get("architectures") if isinstance(values, dict) else None
    if not isinstance(names, list) or len(names) != 1 or names[0] not in ARCHITECTURES:
        raise CheckpointError(
            f"{path}: architectures is {names}, expected one of {list(ARCHITECTURES)}; stock models need no import: "
            "attach to them"
        )
    own = {field.name for field in fields(Settings)}
    settings = Settings(**{name: value for name, value in values.items() if name in own})
    architecture, model_type = ARCHITECTURES[names[0]]
    # ``auto_map`` names code of the checkpoint, which nothing here or later runs.
    stock = {name: value for name, value in values.items() if name not in own | {"auto_map"}}
    return stock | {"architectures": [architecture], "model_type": model_type}, settings


def _read_places(folder: Path) -> dict[str, _Place]:
    """List the tensors of a checkpoint's safetensors files by name, from the files' headers."""
    if (folder / INDEX_FILE).is_file():
        try:
            listed = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))["weight_map"].values()
            files = sorted(set(listed))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(
                f"{folder / INDEX_FILE} cannot be read ({type(error).__name__}); download it again"
            ) from None
    elif (folder / WEIGHTS_FILE).is_file():
        files = [WEIGHTS_FILE]
    else:
        others = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth"))
        found = f"; {', '.join(others)} would run code when read, and is left alone" if others else ""
        raise CheckpointError(f"{folder} has neither {INDEX_FILE} nor {WEIGHTS_FILE}, expected safetensors{found}")
    if lost := [name for name in files if Path(name).name != name or not (folder / name).is_file()]:
        raise CheckpointError(f"{folder} lacks {lost}, which its {INDEX_FILE} names; download it again")
    places = {}
    for name in files:
        try:
            with safe_open(folder / name, "pt") as opened:
                for key in opened.keys():  # noqa: SIM118
                    places[key] = _Place(folder / name, tuple(opened.get_slice(key).get_shape()))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{folder / name} cannot be read ({error}); the file may be truncated: copy or download it again"
            ) from None
    return places


def _describe(model: Path, places: dict[str, _Place]) -> tuple[dict[str, torch.Size], set[str], BaseModel]:
    """Return the stock model's weights by name and shape, those that need no storing, and the model for adapters."""
    with torch.device("meta"):
        empty: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    shapes = {name: weight.shape for name, weight in empty.state_dict().items()}
    embeddings = empty.get_input_embeddings()
    name = next(name for name, module in empty.named_modules() if module is embeddings) + ".weight"
    stock = empty.get_parameter(name)
    if name in places and places[name].shape == tuple(stock.shape):  # else the check to come says so
        embeddings.weight = nn.Parameter(places[name].read(name), requires_grad=False)
    tied = {"lm_head.weight"} if empty.config.tie_word_embeddings else set()  # the embeddings, stored once
    decoder = find_decoder(empty)
    return shapes, tied, base_model(empty, decoder, full_attention_layers(empty, decoder))


def _routers(base: BaseModel) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the weights of fresh routers by name, and these names by those of a released checkpoint."""
    fresh = nn.ModuleDict({str(layer): LayerRouter(base.head_dim) for layer in base.routed_layers}).state_dict()
    names = {}
    for ours in fresh:
        layer, part, rest = ours.split(".", 2)
        names[f"{ROUTER.format(layer)}{ROUTER_PARTS[part]}.{rest}"] = ours
    return fresh, names


def _check(
    places: dict[str, _Place],
    model: dict[str, torch.Size],
    routers: dict[str, torch.Size],
    tied: set[str],
) -> tuple[str, ...]:
    """Refuse weights that are unknown, missing or of another shape; return the names of left-overs."""
    wanted = {**model, **routers}
    left_over = {name for name in set(places) - set(wanted) if LEFT_OVERS & set(name.split("."))}
    for what, wrong in (
        ("unknown weights", set(places) - set(wanted) - left_over),
        ("missing weights", set(wanted) - set(places) - tied),
    ):
        if wrong:
            raise CheckpointError(f"{what} in the checkpoint: {_some(wrong)}; expected a released checkpoint's layout")
    for name, shape in wanted.items():
        if name in places and places[name].shape != tuple(shape):
            raise CheckpointError(f"{name} has shape {places[name].shape}, expected {tuple(shape)}")
    return tuple(sorted(left_over))


def _some(names: Collection[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(sorted(names)[:most]) + more


def _load_routers(base: BaseModel, weights: dict[str, torch.Tensor]) -> nn.ModuleDict:
    """Make routers of these weights, in float32."""
    for name, weight in weights.items():
        if not weight.isfinite().all():
            raise CheckpointError(f"the router weight {name} holds NaN or infinity; the checkpoint is damaged")
    routers = nn.ModuleDict({str(layer): LayerRouter(base.head_dim) for layer in base.routed_layers})
    routers.load_state_dict(weights)
    return routers


def _link(path: Path, file: Path) -> None:
    try:
        path.symlink_to(file.resolve())
    except OSError as error:
        raise CheckpointError(
            f"cannot link to {file} ({error.strerror or error}); copy the weights instead: copy=True (--copy)"
        ) from None


def _write_weights(folder: Path, model: Path, own: dict[str, _Place], places: dict[str, _Place], copy: bool) -> None:
    """Fill the model's folder with its weights, linked or copied, and with the checkpoint's other files."""
    for path in folder.iterdir():
        if path.suffix in OTHER_FILES and path.name not in (CONFIG_FILE, INDEX_FILE):
            shutil.copyfile(path, model / path.name)
    for file in sorted({place.file for place in own.values()}):
        names = [name for name, place in own.items() if place.file == file]
        if not copy:
            _link(model / file.name, file)
        elif len(names) == sum(place.file == file for place in places.values()):
            shutil.copyfile(file, model / file.name)
        else:
            with safe_open(file, "pt") as opened:
                weights = {name: opened.get_tensor(name) for name in names}
            save_file(weights, model / file.name, metadata={"format": "pt"})
    if (folder / INDEX_FILE).is_file():
        index = {"metadata": {}, "weight_map": {name: place.file.name for name, place in sorted(own.items())}}
        (model / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
