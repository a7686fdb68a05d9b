"""Reads the header of a GGUF file (llama.cpp's format), and mends what transformers leaves out of such files.

The header is read here because the package ``gguf`` takes seconds for a large vocabulary and tells of a damaged file in
terms of numpy.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, pre_tokenizers
from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from flux_attention.errors import GgufError
from flux_attention.names import GGUF_MARK

#: Formats of values by the file's number for their kind; 8 is text, 9 a list.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
TEXT, LIST, FLOAT32 = 8, 9, 0
VERSIONS = (2, 3)
#: Names (``tokenizer.ggml.pre``) for: each digit is a token of its own, and else text is split as GPT-2 does.
SPLIT_DIGITS = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
#: How Llama 3 splits text, which transformers reads from version 5.23 on only.
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
#: What a tokenizer calls its special tokens, and how a file does.
SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
#: Tensors that scale rotary frequencies; of Llama 3.1 and later, and of Phi-3's long context.
ROPE_FACTORS, ROPE_LONG = "rope_freqs.weight", "rope_factors_long.weight"


class _Cursor:
    """Takes values from a file's bytes, one behind the other."""

    def __init__(self, data: mmap.mmap):
        self.data, self.at = data, 0

    def take(self, form: str) -> Any:
        value = struct.unpack_from("<" + form, self.data, self.at)[0]
        self.at += struct.calcsize("<" + form)
        return value

    def text(self) -> str:
        size = self.take("Q")
        if self.at + size > len(self.data):
            raise struct.error
        self.at += size
        return self.data[self.at - size : self.at].decode("utf-8", errors="replace")

    def value(self) -> Any:
        kind = self.take("I")
        if kind == TEXT:
            return self.text()
        if kind != LIST:
            return self.take(SCALARS[kind])
        kind, count = self.take("I"), self.take("Q")
        if kind == TEXT:
            for _ in range(count):  # a vocabulary, which only transformers needs
                self.at += 8 + struct.unpack_from("<Q", self.data, self.at)[0]
        else:
            self.at += count * struct.calcsize("<" + SCALARS[kind])
        return count


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies in a GGUF file: ``kind`` is the format of its blocks."""

    shape: tuple[int, ...]
    kind: int
    start: int


@dataclass(frozen=True)
class GgufFile:
    """
    A GGUF file's header: its facts (of lists only the length) and its tensors.

    Raises
    ------
    GgufError
        By ``read``, if the file is no GGUF file, is truncated, or one part of several.
    """

    path: Path
    facts: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def architecture(self) -> str:
        """The model's architecture as llama.cpp calls it."""
        return str(self.facts.get("general.architecture"))

    @property
    def name(self) -> str:
        """What the model is called in results and adapters; never what could be the id of a Hub repository."""
        return f"{str(self.facts.get('general.name', '')).strip() or self.path.stem}{GGUF_MARK}"

    @property
    def parameters(self) -> int:
        """How many numbers its tensors hold."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors.values())

    @classmethod
    def read(cls, path: str | Path) -> GgufFile:
        """Read a file's header, and check that the file is whole."""
        path = Path(path).expanduser()
        if path.stat().st_size < 24:
            raise GgufError(f"{path} has {path.stat().st_size} bytes, so it is not a GGUF file; download it again")
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if data[:4] != b"GGUF":
                raise GgufError(f"{path} is not a GGUF file: it does not begin with the bytes GGUF")
            version = struct.unpack_from("<I", data, 4)[0]
            if version not in VERSIONS:
                raise GgufError(f"{path} is GGUF of version {version}, expected {VERSIONS}; convert it anew")
            try:
                found = cls(path, *_header(data))
            except (struct.error, KeyError, OverflowError, IndexError):
                raise GgufError(f"{path} ends within its header; it may be truncated: download it again") from None
        found._check(path.stat().st_size)
        return found

    def _check(self, size: int) -> None:
        if self.facts.get("split.count", 1) > 1:
            raise GgufError(
                f"{self.path} is one part of {self.facts['split.count']}, expected a whole file; merge them with "
                "llama.cpp's llama-gguf-split --merge"
            )
        from gguf import GGML_QUANT_SIZES

        for name, tensor in self.tensors.items():
            numbers, octets = GGML_QUANT_SIZES.get(tensor.kind, (1, 0))  # an unknown kind is for transformers to refuse
            end = tensor.start + math.prod(tensor.shape) // numbers * octets
            if end > size:
                raise GgufError(
                    f"{self.path} has {size:,} bytes, but {name} reaches to {end:,}; it is truncated: download it again"
                )

    def floats(self, name: str) -> torch.Tensor | None:
        """Read a float32 tensor; None if there is none."""
        tensor = self.tensors.get(name)
        if tensor is None or tensor.kind != FLOAT32:
            return None
        with self.path.open("rb") as file:
            file.seek(tensor.start)
            count = math.prod(tensor.shape)
            return torch.tensor(struct.unpack(f"<{count}f", file.read(4 * count))).view(tensor.shape)


def _header(data: mmap.mmap) -> tuple[dict[str, Any], dict[str, Tensor]]:
    cursor = _Cursor(data)
    cursor.at = 8
    count, pairs = cursor.take("Q"), cursor.take("Q")
    facts = {}
    for _ in range(pairs):
        name = cursor.text()
        facts[name] = cursor.value()
    listed = []
    for _ in range(count):
        name, dimensions = cursor.text(), cursor.take("I")
        shape = [cursor.take("Q") for _ in range(dimensions)]
        listed.append((name, tuple(reversed(shape)), cursor.take("I"), cursor.take("Q")))
    unit = facts.get("general.alignment", 32)
    base = -(-cursor.at // unit) * unit
    return facts, {name: Tensor(shape, kind, base + offset) for name, shape, kind, offset in listed}


def mend_rope(config: PreTrainedConfig, file: GgufFile) -> None:
    """
    Write into a configuration how a file scales its rotary frequencies, where transformers does not read it.

    Raises
    ------
    GgufError
        If the frequencies are scaled in a way that cannot be told from the file.
    """
    rope = dict(getattr(config, "rope_parameters", None) or {})
    if rope.get("rope_type", "default") != "default":
        return
    scaling = file.facts.get(f"{file.architecture}.rope.scaling.type", "none")
    factors = file.floats(ROPE_FACTORS)
    if factors is not None:  # of the Llama 3.1 kind, whose only setting that differs between models is the factor
        llama = {"rope_type": "llama3", "factor": factors.max().item(), "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        config.rope_parameters = {**rope, **llama, "original_max_position_embeddings": 8192}
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        plain = rope["rope_theta"] ** -(torch.arange(len(scaled)) / len(scaled))
        if factors.shape == scaled.shape and torch.allclose(plain / scaled, factors, rtol=1e-2):
            return
    elif scaling == "none" and ROPE_LONG not in file.tensors:
        return
    raise GgufError(
        f"{file.path} scales its rotary positions ({scaling}) in a way that transformers does not read from GGUF "
        "files, and would give wrong answers; use the model's original checkpoint"
    )


def mend_tokenizer(tokenizer: PreTrainedTokenizerBase, file: GgufFile) -> None:
    """Split text into words and digits as the file's model was trained to, and name its special tokens."""
    level, kind = pre_tokenizers.ByteLevel, file.facts.get("tokenizer.ggml.pre")
    parts = None
    if kind in SPLIT_DIGITS:
        parts = [pre_tokenizers.Digits(individual_digits=True), level(add_prefix_space=False)]
    elif kind == "llama-bpe":
        split = pre_tokenizers.Split(Regex(LLAMA_3), behavior="isolated")
        parts = [split, level(add_prefix_space=False, use_regex=False)]
    if parts:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    for name, key in SPECIAL.items():  # which versions before 5.23 mistake
        number = file.facts.get(f"tokenizer.ggml.{key}_token_id")
        if number is not None:
            setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(number))
