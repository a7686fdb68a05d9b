"""Finds routes and KV bytes of the shipped model on one text with two endings, a question and none.

Run: ``python benchmarks/two_prompts.py`` (a minute on two cores). Writes benchmarks/results/two_prompts.json, which
README's picture is drawn from. The text is the source of Python's argparse with a few facts written into it.
"""

import argparse
import inspect
from pathlib import Path

from flux_attention import kv_bytes
from flux_attention.results import write_results
from flux_attention.shipped import load_shipped

TOKENS = 4000
FACTS = (
    *("Otto lives in Durban.", "Maya lives in Quito.", "Hugo lives in Bern.", "Lena lives in Cork."),
    *("Victor is a guest of Lena in secret.", "Gustav is a guest of Otto in secret."),
    *("Astrid is a guest of Hugo in secret.", "Silas is a guest of Maya in secret."),
)
QUESTION = "In which city is Gustav?"  # in Durban, with Otto: two look-ups
NEW = 4


def prompts(tokenizer):
    """Return two prompts: the text as it is, and the same text with the question behind it."""
    lines = inspect.getsource(argparse).split("\n")
    for place, fact in enumerate(FACTS):  # all of them far before the end, where a window does not reach
        lines.insert(60 + 20 * place, f"# {fact}")
    text = tokenizer.decode(tokenizer("\n".join(lines))["input_ids"][:TOKENS])
    text = text[: text.rindex("\n")]
    assert all(fact in text for fact in FACTS)
    return {None: text, QUESTION: f"{text}\n# Question: {QUESTION}\n# Answer:"}


def run(model, inputs):
    """Return the new token ids and the bytes of the KV cache."""
    result = model.generate(
        **inputs, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, return_dict_in_generate=True
    )
    return result.sequences[0, inputs["input_ids"].shape[1] :], kv_bytes(result.past_key_values)


def measure():
    """Return a row for each prompt."""
    model, tokenizer, routing = load_shipped()
    for question, prompt in prompts(tokenizer).items():
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        new, held = run(model, inputs)
        routes = routing.routes.to_dict()
        (sequence,) = routes["sequences"]
        with routing.force("full"):
            _, dense = run(model, inputs)
        yield {
            "shape": "shipped",
            "seq_len": sequence["tokens"],
            "batch": 1,
            "phase": "prefill",
            "engine": "flux",
            "method": "routed",
            "sparsity": round(sequence["msr"], 4),
            "kv_bytes": held,
            "baseline": "own-dense",
            "baseline_kv_bytes": dense,
            "layers": routes["layers"],
            "full_layers": sequence["full_layers"],
            "question": question,
            "continuation": tokenizer.decode(new),
        }


if __name__ == "__main__":
    write_results(Path(__file__).parent / "results/two_prompts.json", list(measure()))
