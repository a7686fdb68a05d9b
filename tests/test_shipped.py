"""The shipped model: small, stock, and doing what README says, on inputs that are the same on every run."""

import itertools
import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

from flux_attention.evaluation.base import adapter_hash
from flux_attention.shipped import BACKBONE, ROUTERS, load_shipped
from flux_attention.tasks.families import FAMILIES
from flux_attention.tasks.samples import make_sample
from flux_attention.tasks.scoring import evaluate

#: Tokens of a sample: more than the 768 that sparse layers keep; and of those of the report.
LENGTH, REPORT_LENGTH = 2048, 4096


@pytest.fixture(scope="module")
def shipped():
    return load_shipped()


def test_files_are_small_stock_and_safe():
    files = [path for folder in (BACKBONE, ROUTERS) for path in folder.iterdir()]
    assert sum(path.stat().st_size for path in files) <= 25 * 2**20
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    config = json.loads((BACKBONE / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert "auto_map" not in config


def test_weights_are_finite(shipped):
    model, _, routing = shipped
    assert all(parameter.isfinite().all() for parameter in (*model.parameters(), *routing.routers.parameters()))
    assert routing.config.base_model.sample is not None


def is_out_of_sight(sample, sink, window):
    """Whether the answer stands in the prompt only where sparse layers do not see it from the question."""
    prompt, answer = (list(map(int, ids)) for ids in (sample.prompt_ids, sample.answer_ids[:-1]))  # without its newline
    places = [at for at in range(len(prompt)) if prompt[at : at + len(answer)] == answer]
    assert places
    return all(sink <= at < len(prompt) - window for at in places)


@pytest.mark.parametrize("family", ["single_needle", "two_hop"])
def test_routing_keeps_answers_that_sparse_attention_loses(shipped, haystack, family):
    """Of samples that sparse layers cannot answer, as texts differ between versions of Python, and with them places."""
    model, tokenizer, routing = shipped
    sink, window = routing.config.sparse["sink"], routing.config.sparse["window"]
    made = (make_sample(family, haystack, tokenizer, LENGTH, seed) for seed in range(40))
    samples = list(itertools.islice((one for one in made if is_out_of_sight(one, sink, window)), 4))
    assert len(samples) == 4
    routed = evaluate(model, samples, routing)
    assert routed.accuracy >= 0.75
    assert routed.msr >= 0.4
    with routing.force("sparse"):
        assert evaluate(model, samples, routing).accuracy <= 0.25


def test_plain_text_needs_fewer_full_layers_than_questions(shipped, haystack):
    model, tokenizer, routing = shipped
    sparsity = {
        family: evaluate(model, [make_sample(family, haystack, tokenizer, 1024, s) for s in range(3)], routing).msr
        for family in ("plain", "two_hop")
    }
    assert sparsity["plain"] >= sparsity["two_hop"] + 0.15


@torch.no_grad()
def test_scores_are_what_greedy_generation_gives(shipped, haystack):
    """The harness scores in one forward; generating through the routed cache must agree, right or wrong."""
    model, tokenizer, routing = shipped
    outcomes = set()
    for seed, family in enumerate(("multi_key", "multi_value", "count")):
        sample = make_sample(family, haystack, tokenizer, 1024, seed)
        for spec in ("full", "sparse", [6, 8]):
            with routing.force(spec):
                right = evaluate(model, [sample], routing).right[0]
                ids = torch.from_numpy(sample.prompt_ids.astype(np.int64))[None]
                new = model.generate(ids, max_new_tokens=len(sample.answer_ids), do_sample=False, pad_token_id=2)
            assert (new[0, ids.shape[1] :].tolist() == sample.answer_ids.tolist()) == right, (family, spec)
            outcomes.add(right)
    assert len(outcomes) == 2


def test_the_report_covers_every_family_and_method():
    """With at least 200 samples, of the routers that are in the package."""
    root = Path(__file__).parents[1]
    report = json.loads((root / "benchmarks/results/demo_quality.json").read_text())
    routers = str(ROUTERS.relative_to(root))
    rows = [row for row in report["rows"] if row["routers"] in (None, routers)]
    seen = {(row["task"], row["method"]) for row in rows}
    assert seen == {(family, method) for family in FAMILIES for method in ("dense", "routed", "sparse", "best-static")}
    assert all(row["n"] >= 200 and row["seq_len"] == REPORT_LENGTH and 0 <= row["sparsity"] <= 1 for row in rows)
    assert dict(report["meta"]["settings"]["adapters"])[routers] == adapter_hash(ROUTERS)


def test_the_example_runs(capsys):
    runpy.run_path(str(Path(__file__).parents[1] / "examples/quickstart.py"), run_name="__main__")
    assert "a fact from the text: ' 48213" in capsys.readouterr().out
