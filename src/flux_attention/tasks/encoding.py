"""Encodes prompts and answers as a model is used to them: through its tokenizer's chat template, or as plain text."""

from __future__ import annotations

from typing import Any

#: For every call of a tokenizer: no mask, which takes time to make; no word about lengths.
TERSE = {"return_attention_mask": False, "verbose": False}


def has_chat(tokenizer, chat: bool | None = None) -> bool:
    """Whether prompts go through the chat template: as asked for, else where the tokenizer has one."""
    return bool(getattr(tokenizer, "chat_template", None)) if chat is None else chat


def joined(context: str, question: str, question_first: bool = False) -> str:
    """Join a context and what is asked about it, as one text."""
    parts = [question, context] if question_first else [context, question]
    return "\n\n".join(part for part in parts if part.strip())


def encode_prompts(
    texts: list[str], tokenizer, chat: bool, template_kwargs: dict[str, Any] | None = None
) -> list[list[int]]:
    """
    Encode prompts, in one call of the tokenizer.

    Parameters
    ----------
    chat : bool
        Whether they go through the chat template, as a user's message each.
    template_kwargs : dict, optional
        What the template takes besides, such as ``enable_thinking``.
    """
    if chat and texts:
        messages = [[{"role": "user", "content": text}] for text in texts]
        settings = {"tokenizer_kwargs": TERSE, **(template_kwargs or {})}
        settings |= {"add_generation_prompt": True, "return_dict": True}
        return tokenizer.apply_chat_template(messages, **settings)["input_ids"]
    prompts = encode_texts(texts, tokenizer)
    end = tokenizer.eos_token_id  # which some tokenizers put after every text
    return [ids[:-1] if ids and ids[-1] == end else ids for ids in prompts]


def encode_prompt(text: str, tokenizer, chat: bool, template_kwargs: dict[str, Any] | None = None) -> list[int]:
    """Encode one prompt; see ``encode_prompts``."""
    return encode_prompts([text], tokenizer, chat, template_kwargs)[0]


def encode_answers(texts: list[str], tokenizer) -> list[list[int]]:
    """Encode answers, each with the token that ends a turn."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return [ids + end for ids in encode_texts(texts, tokenizer, add_special_tokens=False)]


def encode_answer(text: str, tokenizer) -> list[int]:
    """Encode one answer; see ``encode_answers``."""
    return encode_answers([text], tokenizer)[0]


def encode_texts(texts: list[str], tokenizer, **settings) -> list[list[int]]:
    """Encode texts as they are, in one call of the tokenizer."""
    return tokenizer(texts, **TERSE, **settings)["input_ids"] if texts else []


def without_middle(prompt: list[int], room: int) -> list[int]:
    """Shorten a prompt to ``room`` tokens: what frames the context stands at both ends, so the middle goes."""
    return prompt if len(prompt) <= room else prompt[: (room + 1) // 2] + prompt[len(prompt) - room // 2 :]
