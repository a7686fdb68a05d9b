"""Packs sequences to a budget of tokens, orders the packs of a whole run, and makes tensors of them."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence

import numpy as np
import torch
from torch.utils.data import Dataset

from flux_attention.training.generated import Generated
from flux_attention.training.records import Example


def pack(lengths: Sequence[int], budget: int, seed: int = 0) -> list[list[int]]:
    """
    Choose which sequences go together: each pack has at most ``budget`` tokens (or one longer sequence).

    Sequences are shuffled, then each goes into the first of the latest packs that has room.
    """
    order = list(range(len(lengths)))
    random.Random(seed).shuffle(order)
    packs: list[list[int]] = []
    room: list[int] = []
    for index in order:
        recent = range(max(0, len(packs) - 32), len(packs))
        place = next((place for place in recent if room[place] >= lengths[index]), None)
        if place is None:
            place = len(packs)
            packs.append([])
            room.append(budget)
        packs[place].append(index)
        room[place] -= lengths[index]
    return packs


class PackedExamples(Dataset):
    """Holds packs of sequences: each item is a list of (number of the sequence, Example)."""

    def __init__(self, sources: list[Sequence[Example]], budget: int, seed: int = 0):
        self.sources = sources
        self.places = [(source, index) for source, some in enumerate(sources) for index in range(len(some))]
        lengths = []
        for some in sources:
            lengths += some.lengths if isinstance(some, Generated) else [len(example.input_ids) for example in some]
        self.packs = pack(lengths, budget, seed)
        self.tokens = sum(lengths)

    def __len__(self) -> int:
        return len(self.packs)

    def hash(self) -> str:
        """Hash what the packs hold (SHA-256): of generated sources, their text and sizes."""
        digest = hashlib.sha256(json.dumps(self.packs).encode())
        for some in self.sources:
            if isinstance(some, Generated):
                digest.update(some.digest())
            else:
                for example in some:
                    digest.update(f"{example.task} {example.labels_from} {example.prompt_length}".encode())
                    digest.update(example.input_ids.tobytes())
        return digest.hexdigest()

    def __getitem__(self, index: int) -> list[tuple[int, Example]]:
        found = []
        for number in self.packs[index]:
            source, place = self.places[number]
            found.append((number, self.sources[source][place]))
        return found


class Steps(Dataset):
    """
    Orders the packs of a whole run as they are trained on: every pass over the data is shuffled anew.

    One long epoch, so that no step is short and N processes share each step evenly.
    """

    def __init__(self, packs: PackedExamples, count: int, seed: int):
        self.packs, self.count, self.seed, self._orders = packs, count, seed, {}

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> list[tuple[int, Example]]:
        turn, place = divmod(index, len(self.packs))
        if turn not in self._orders:
            order = list(range(len(self.packs)))
            random.Random(f"{self.seed}-{turn}").shuffle(order)
            self._orders = {turn: order}
        return self.packs[self._orders[turn][place]]


def collate(packs: list[list[tuple[int, Example]]], classes: dict[str, int]) -> dict[str, torch.Tensor]:
    """
    Put sequences behind one another in one row.

    Returns
    -------
    dict
        ``input_ids``, ``position_ids``, ``labels`` (1, S), with -100 where there is no loss; and of each of the N
        sequences its ``sequence_lengths``, ``prompt_lengths``, ``classes`` and ``numbers`` (N,).
    """
    numbers, examples = zip(*[item for items in packs for item in items], strict=True)
    labels = [np.where(np.arange(len(e.input_ids)) < e.labels_from, -100, e.input_ids) for e in examples]
    lengths = [len(example.input_ids) for example in examples]

    def tensor(values) -> torch.Tensor:
        return torch.from_numpy(np.asarray(values, np.int64))

    return {
        "input_ids": tensor(np.concatenate([example.input_ids for example in examples]))[None],
        "position_ids": tensor(np.concatenate([np.arange(length) for length in lengths]))[None],
        "labels": tensor(np.concatenate(labels))[None],
        "sequence_lengths": tensor(lengths),
        "prompt_lengths": tensor([example.prompt_length for example in examples]),
        "classes": tensor([classes[example.task] for example in examples]),
        "numbers": tensor(numbers),
    }
