"""Encodes records as sequences of at most so many tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from flux_attention.tasks.encoding import encode_answers, encode_prompts, encode_texts, joined, without_middle
from flux_attention.tasks.records import is_plain
from flux_attention.training.records import PLAIN, Example
from flux_attention.training.shortening import answer_places, shorten

#: Of the room that a shortened prompt has, what may stay empty.
SLACK = 0.01


@dataclass(frozen=True)
class Encoder:
    """
    Encodes well-formed records.

    Attributes
    ----------
    tokenizer : transformers.PreTrainedTokenizerBase
        The model's.
    max_length : int
        Tokens of a sequence at most.
    chat_template : bool
        Whether context and question go through the tokenizer's chat template as a user's message.
    chat_template_kwargs : dict
        What the template takes besides, such as ``enable_thinking``.
    """

    tokenizer: Any
    max_length: int
    chat_template: bool = False
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)

    def __call__(self, records: list[dict[str, Any]]) -> list[Example | str]:
        """
        Encode records as sequences; of a record that is to be left out, say why.

        A prompt that is too long keeps what its answer stands on (``shorten``), or is left out; where its answer is not
        in the context, it loses its middle. Plain text and, beyond half of ``max_length``, an answer lose their ends.
        """
        questions = [record for record in records if not is_plain(record)]
        texts = encode_texts([record["text"] for record in records if is_plain(record)], self.tokenizer)
        prompts = self.prompts(questions)
        answers = encode_answers([record["answer"] for record in questions], self.tokenizer)
        plain, asked = map(self._plain, texts), map(self._asked, questions, prompts, answers)
        return [next(plain if is_plain(record) else asked) for record in records]

    def prompts(self, records: list[dict[str, Any]]) -> list[list[int]]:
        """Encode what routers read of questions with their contexts."""
        texts = [joined(one["context"], one["question"], bool(one["metadata"].get("is_prefix"))) for one in records]
        texts = texts if self.chat_template else [f"{text}\n" for text in texts]
        return encode_prompts(texts, self.tokenizer, self.chat_template, self.chat_template_kwargs)

    def _plain(self, whole: list[int]) -> Example:
        ids = whole[: self.max_length]
        return Example(np.asarray(ids, np.int32), 1, len(ids), PLAIN, len(ids) < len(whole))

    def _asked(self, record: dict[str, Any], prompt: list[int], whole: list[int]) -> Example | str:
        answer = whole[: max(1, self.max_length // 2)]
        room = self.max_length - len(answer)
        shortened = len(prompt) > room or len(answer) < len(whole)
        if len(prompt) > room:
            parts = answer_places(record["answer"], record["context"])
            if parts:
                kept = self._around(record, parts, len(prompt), room)
                if isinstance(kept, str):
                    return kept
                prompt = kept
            else:
                prompt = without_middle(prompt, room)
        ids = np.asarray(prompt + answer, np.int32)
        return Example(ids, len(prompt), len(prompt), record["metadata"]["task"], shortened)

    def _around(self, record: dict[str, Any], parts: list, tokens: int, room: int) -> list[int] | str:
        """Encode a prompt with as much of its context as there is room for, or say that the answer's place is lost."""
        context = record["context"]

        def encode(context: str) -> list[int]:
            return self.prompts([{**record, "context": context}])[0]

        least = shorten(context, parts, 0)
        best = encode(least)
        if len(best) > room:
            return f"the question and where the answer stands in the context take {len(best)} tokens of {room}"
        # Characters and their tokens: what fits, and what does not.
        low, high = (len(least), len(best)), (len(context), tokens)
        for _ in range(8):
            length = low[0] + (high[0] - low[0]) * (room - low[1]) // (high[1] - low[1])
            if room - low[1] <= SLACK * room or not low[0] < length < high[0]:
                break
            prompt = encode(shorten(context, parts, length))
            if len(prompt) <= room:
                low, best = (length, len(prompt)), prompt
            else:
                high = (length, len(prompt))
        return best
