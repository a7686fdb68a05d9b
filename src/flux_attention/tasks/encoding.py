"""Encodes prompts and answers as a model is used to them: through its tokenizer's chat template, or as plain text."""

from __future__ import annotations

from typing import Any


def has_chat(tokenizer, chat: bool | None = None) -> bool:
    """Whether prompts go through the chat template: as asked for, else where the tokenizer has one."""
    return bool(getattr(tokenizer, "chat_template", None)) if chat is None else chat


def joined(context: str, question: str, question_first: bool = False) -> str:
    """Join a context and what is asked about it, as one text."""
    parts = [question, context] if question_first else [context, question]
    return "\n\n".join(part for part in parts if part.strip())


def encode_prompt(text: str, tokenizer, chat: bool, template_kwargs: dict[str, Any] | None = None) -> list[int]:
    """
    Encode a prompt.

    Parameters
    ----------
    chat : bool
        Whether it goes through the chat template, as a user's message.
    template_kwargs : dict, optional
        What the template takes besides, such as ``enable_thinking``.
    """
    if chat:
        message = [{"role": "user", "content": text}]
        settings = {**(template_kwargs or {}), "add_generation_prompt": True, "return_dict": True}
        return list(tokenizer.apply_chat_template(message, **settings)["input_ids"])
    ids = list(tokenizer(text)["input_ids"])
    if ids and ids[-1] == tokenizer.eos_token_id:  # some tokenizers end every text
        ids = ids[:-1]
    return ids


def encode_answer(text: str, tokenizer) -> list[int]:
    """Encode an answer, with the token that ends a turn."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return list(tokenizer(text, add_special_tokens=False)["input_ids"]) + end


def without_middle(prompt: list[int], room: int) -> list[int]:
    """Shorten a prompt to ``room`` tokens: what frames the context stands at both ends, so the middle goes."""
    return prompt if len(prompt) <= room else prompt[: (room + 1) // 2] + prompt[len(prompt) - room // 2 :]
