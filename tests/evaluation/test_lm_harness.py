"""lm-evaluation-harness with routed models: likelihoods, routes by context, generation, its command line."""

import functools
import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from statistics import fmean

import pytest
import torch
from helpers.command import flux
from helpers.lm_tasks import CONTEXTS
from helpers.shipped import SPARSE
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from torch.utils import collect_env

from flux_attention import FluxConfig, attach
from flux_attention.evaluation import quality
from flux_attention.evaluation.lm_harness import FluxLM, TaskEvaluation, _parse_force, _task_rows
from flux_attention.evaluation.report import write_report
from flux_attention.routes import unit_name
from flux_attention.shipped import BACKBONE, load_shipped

lm_eval = pytest.importorskip("lm_eval")


ARGUMENTS = dict(device="cpu", dtype="float32")
#: Of different lengths, some of one token, and two that differ in their last token only.
ENDINGS = [" 48213", " 48219", " 4", " x", " 48213.\n# and"]


@pytest.fixture(scope="module", autouse=True)
def packages_listed_once():
    """Each evaluation by lm-eval asks pip for what is installed, which takes longer than most of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collect_env, "get_pretty_env_info", functools.cache(collect_env.get_pretty_env_info))
        yield


@pytest.fixture(scope="module")
def lm(short_adapter):
    return FluxLM(str(BACKBONE), routers=short_adapter, batch_size=4, **ARGUMENTS)


@pytest.fixture(scope="module")
def shipped(short_adapter):
    """Model, tokenizer and handle, without lm-eval."""
    model, tokenizer, routing = load_shipped()
    routing.detach()
    return model, tokenizer, attach(model, short_adapter)


def requests(kind, arguments):
    return [Instance(kind, {}, tuple(each), index) for index, each in enumerate(arguments)]


def pairs():
    return [(text, ending) for text in CONTEXTS for ending in ENDINGS]


@torch.no_grad()
def score(model, prompt, continuation, read=None, **kwargs):
    """Sum of log probabilities of ``continuation`` after ``prompt`` (tokens), and whether greedy decoding gives it."""
    ids = torch.tensor([prompt + continuation])
    if read is not None:
        kwargs["prompt_lengths"] = [read]
    logits = model(ids, use_cache=False, **kwargs).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    expected = torch.tensor(continuation)
    return logits.gather(1, expected[:, None]).sum().item(), bool((logits.argmax(-1) == expected).all())


def split(tokenizer, text, ending):
    prompt = tokenizer.encode(text)
    return prompt, tokenizer.encode(text + ending)[len(prompt) :]


def assert_same(found, expected):
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    torch.testing.assert_close(
        torch.tensor([value for value, _ in found]),
        torch.tensor([value for value, _ in expected]),
        atol=1e-4,
        rtol=1e-5,
    )


@pytest.fixture(scope="module")
def scores(lm):
    """What lm-eval gets for ``pairs()``."""
    return lm.loglikelihood(requests("loglikelihood", pairs()), disable_tqdm=True)


def test_likelihoods_are_the_models_own(lm, shipped, scores):
    model, tokenizer, routing = shipped
    tokens = [split(tokenizer, *pair) for pair in pairs()]
    assert len(tokens[0][0]) > 250 and len(tokens[5][0]) > 80
    assert_same(scores, [score(model, *each, read=len(each[0])) for each in tokens])
    with routing.force("full"):
        dense = [score(model, *each)[0] for each in tokens]
    assert max(abs(a - b) for (a, _), b in zip(scores, dense, strict=True)) > 0.1


def test_batches_change_nothing(lm, scores, monkeypatch):
    monkeypatch.setattr(lm, "batch_size_per_gpu", 1)
    monkeypatch.setattr(lm, "logits_cache", False)
    assert_same(lm.loglikelihood(requests("loglikelihood", pairs()), disable_tqdm=True), scores)
    monkeypatch.setattr(lm, "batch_size_per_gpu", "auto")
    monkeypatch.setattr(lm, "max_batch_size", 2)
    short = slice(10, None)
    assert_same(lm.loglikelihood(requests("loglikelihood", pairs()[short]), disable_tqdm=True), scores[short])
    assert lm.batch_sizes == {0: 2}


def test_routes_depend_on_the_context_alone(lm, monkeypatch):
    seen = []
    call = lm._model_call

    def watched(*args):
        logits = call(*args)
        seen.append(lm.routing.routes)
        return logits

    monkeypatch.setattr(lm, "_model_call", watched)
    monkeypatch.setattr(lm, "routed", [])
    endings = [*ENDINGS, "\n" + CONTEXTS[1]]  # one that would be routed differently
    lm.loglikelihood(requests("loglikelihood", [(CONTEXTS[0], ending) for ending in endings]), disable_tqdm=True)
    length = len(lm.tok_encode(CONTEXTS[0]))
    assert {read for routes in seen for read in routes.lengths} == {length}
    logits = torch.cat([routes.logits_BL2 for routes in seen])
    assert len(logits) == len(lm.msr) == 5  # six endings, two of which differ in their last token only
    torch.testing.assert_close(logits, logits[:1].expand_as(logits), atol=1e-4, rtol=1e-4)
    assert len({tuple(row) for routes in seen for row in routes.routes_BL.tolist()}) == 1
    assert 0 < seen[0].msr[0] < 1


def test_same_tokens_split_in_two_ways(lm, shipped):
    """They share a forward in stock lm-eval; here their prompts, and so their routes, differ."""
    model, tokenizer, _ = shipped
    prompt, ending = split(tokenizer, CONTEXTS[0], ENDINGS[0])
    ways = [(("a", "b"), prompt, ending), (("c", "d"), prompt[:150], prompt[150:] + ending)]
    found = lm._loglikelihood_tokens(ways, disable_tqdm=True)
    assert_same(found, [score(model, *way[1:], read=len(way[1])) for way in ways])


def test_truncated_on_the_left(lm, shipped, monkeypatch):
    model, tokenizer, _ = shipped
    monkeypatch.setattr(lm, "_max_length", 200)
    found = lm.loglikelihood(requests("loglikelihood", pairs()[:5]), disable_tqdm=True)
    expected = []
    for text, ending in pairs()[:5]:
        prompt, continuation = split(tokenizer, text, ending)
        prompt = prompt[-(201 - len(continuation)) :]
        expected.append(score(model, prompt, continuation, read=len(prompt)))
    assert_same(found, expected)


def test_forced_full_is_the_stock_model(lm):
    stock = HFLM(str(BACKBONE), batch_size=4, **ARGUMENTS)
    asked = requests("loglikelihood", pairs()[::3])
    with lm.routing.force("full"):
        assert_same(lm.loglikelihood(asked, disable_tqdm=True), stock.loglikelihood(asked, disable_tqdm=True))
        rolling = requests("loglikelihood_rolling", [(text,) for text in CONTEXTS])
        assert lm.loglikelihood_rolling(rolling, True) == pytest.approx(stock.loglikelihood_rolling(rolling, True))
        prompts = requests("generate_until", [(text, {"until": ["\n"], "max_gen_toks": 6}) for text in CONTEXTS])
        assert lm.generate_until(prompts, True) == stock.generate_until(prompts, True)


def test_rolling_reads_the_window(lm, shipped, monkeypatch):
    model, tokenizer, _ = shipped
    monkeypatch.setattr(lm, "_max_length", 200)  # two windows for the first text
    ids = tokenizer.encode(CONTEXTS[0])
    (found,) = lm.loglikelihood_rolling(requests("loglikelihood_rolling", [(CONTEXTS[0],)]), disable_tqdm=True)
    start = [lm.prefix_token_id, *ids]
    # A window's last token is scored but never read, by the model or its routers.
    first = score(model, start[:1], start[1:201], read=200)[0]
    last = score(model, start[-201:201], start[201:], read=200)[0]
    assert found == pytest.approx(first + last, abs=1e-3)


def test_generation(lm, shipped, monkeypatch):
    model, tokenizer, _ = shipped
    monkeypatch.setattr(lm, "routed", [])
    prompts = requests("generate_until", [(text, {"until": ["\n"], "max_gen_toks": 6}) for text in CONTEXTS])
    expected = []
    for text in CONTEXTS:
        ids = tokenizer(text, return_tensors="pt").input_ids
        output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
        expected.append(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).split("\n")[0])
    assert lm.generate_until(prompts, disable_tqdm=True) == expected
    assert expected[0] == " 48213" and len(lm.msr) == 3


def test_tasks(tasks, shipped, short_adapter):
    results = lm_eval.simple_evaluate(
        model="flux",
        model_args=f"pretrained={BACKBONE},routers={short_adapter},dtype=float32",
        tasks=["flux_choice", "flux_answer"],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        batch_size=2,
        device="cpu",
        bootstrap_iters=0,
    )
    model, tokenizer, routing = shipped
    msr = []
    for sample in results["samples"]["flux_choice"]:
        for ending, ((found, greedy),) in zip(sample["doc"]["choices"], sample["resps"], strict=True):
            prompt, continuation = split(tokenizer, sample["doc"]["text"], ending)
            assert_same([(float(found), greedy in (True, "True"))], [score(model, prompt, continuation, len(prompt))])
            msr += routing.routes.msr
        msr += routing.routes.msr  # of the generation task's prompt
    # The model knows the codes that it was told.
    assert results["results"]["flux_choice"]["acc,none"] >= 2 / 3
    assert results["results"]["flux_answer"]["exact_match,none"] >= 2 / 3
    facts = results["config"]["flux_attention"]
    assert facts["mean_msr"] == pytest.approx(fmean(msr)) and facts["sequences"] == len(msr) == 12
    assert facts["routers"] == short_adapter and facts["force"] is None
    json.dumps(facts)


def test_command_line(tasks, tmp_path, short_adapter):
    """``python -m``, but for the index of lm-eval's own tasks."""
    module = (
        "import functools, runpy\n"
        "from lm_eval import tasks\n"
        "tasks.TaskManager = functools.partial(tasks.TaskManager, include_defaults=False)\n"
        "runpy.run_module('flux_attention.evaluation.lm_harness', run_name='__main__', alter_sys=True)"
    )
    command = [sys.executable, "-c", module, "--model", "flux", "--device", "cpu"]
    arguments = f"pretrained={BACKBONE},routers={short_adapter},dtype=float32,force=3;7"
    command += ["--model_args", arguments, "--tasks", "flux_choice", "--include_path", str(tasks)]
    result = subprocess.run(
        [*command, "--output_path", str(tmp_path), "--limit", "1"],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert "flux_choice" in result.stdout and "mean Ω_MSR of 3 sequences: 0.800" in result.stderr
    (path,) = Path(tmp_path).rglob("results_*.json")
    facts = json.loads(path.read_text())["config"]["flux_attention"]
    assert facts["mean_msr"] == pytest.approx(0.8) and facts["force"] == "3;7"


def test_tasks_by_method(tasks, tmp_path, monkeypatch, own_tasks_only, short_adapter):
    """Rows are what lm-eval says of the same forced routes; a run goes on, and has a report."""
    model, tokenizer, routing = load_shipped()
    routing.detach()
    counts = []

    def make(**changes):
        names = ["flux_choice", "flux_answer"]
        arguments = dict(choose=lambda routing, count, tell: counts.append(count) or [6, 8], include_path=str(tasks))
        return TaskEvaluation(model, tokenizer, [short_adapter], names, samples=3, **{**arguments, **changes})

    told = []
    rows = quality.run(make(), tmp_path, False, lambda *far: told.append(far))
    assert told[-1][:3] == ("running tasks", make().kinds * len(make().tasks), make().kinds * len(make().tasks))
    by = {(row["task"], row["method"]): row for row in rows}
    methods = ("dense", "sparse", "routed", "static", "random")
    assert set(by) == {(task, method) for task in ("flux_choice", "flux_answer") for method in methods}
    for method, force in (("sparse", "sparse"), ("routed", None)):
        lm = FluxLM(model, routers=short_adapter, tokenizer=tokenizer, force=force)
        manager = TaskManager(include_path=str(tasks), include_defaults=False)
        found = lm_eval.simple_evaluate(lm, tasks=["flux_choice"], task_manager=manager, bootstrap_iters=0)
        lm.routing.detach()
        row = by["flux_choice", method]
        assert row["accuracy"] == pytest.approx(found["results"]["flux_choice"]["acc,none"], abs=1e-4)
        assert sum(row["scores"]) == pytest.approx(3 * row["accuracy"], abs=1e-3) and row["metric"] == "acc"
        assert row["sparsity"] == pytest.approx(fmean(lm.msr), abs=1e-4)
        assert row["esr"] == pytest.approx(fmean(lm.esr)) and len(lm.esr) == len(lm.msr)
        assert list(row["fa_rate"]) == [str(layer) for layer in lm.routing.layers]
        assert fmean(row["fa_rate"].values()) == pytest.approx(1 - row["sparsity"], abs=2e-4)
        assert row["low"] <= row["accuracy"] <= row["high"]
    assert by["flux_answer", "dense"]["metric"] == "exact_match" and by["flux_answer", "dense"]["accuracy"] >= 0.6
    mean = fmean(by[task, "routed"]["sparsity"] for task in ("flux_choice", "flux_answer"))
    assert counts == [math.ceil((1 - mean) * 10 - 1e-3)]
    assert by["flux_choice", "static"]["full_layers"] == [6, 8]
    for task in ("flux_choice", "flux_answer"):
        drawn = by[task, "random"]
        assert drawn["sparsity"] == pytest.approx(1 - counts[0] / 10) and by[task, "static"]["sparsity"] == 0.8
        assert sum(0 < rate < 1 for rate in drawn["fa_rate"].values()) > 2  # not the same layers for all
    monkeypatch.setattr(lm_eval, "simple_evaluate", None)  # nothing is measured again
    assert quality.run(make(), tmp_path, False) == rows
    _, markdown = write_report(tmp_path / "quality.json", tmp_path)
    assert "## Accuracy on lm-eval's tasks" in markdown.read_text()
    assert "Share of full attention, routers, on lm-eval's tasks" in (tmp_path / "report.html").read_text()
    with pytest.raises(ValueError, match=r"no tasks \['poems'\]"):
        TaskEvaluation(model, tokenizer, [short_adapter], ["poems"])
    with pytest.raises(ValueError, match=r"methods \['best-static'\] are not for"):
        make(methods=["best-static"])


def test_tasks_by_head(tasks, tmp_path, own_tasks_only, short_adapter):
    """Likelihoods only; a run that goes on keeps the heads that were chosen."""
    model, tokenizer, routing = load_shipped()
    routing.detach()
    heads = attach(model, FluxConfig(**SPARSE, granularity="head"))
    heads.save_pretrained(tmp_path / "heads")
    names, chosen = [unit_name(unit) for unit in heads.units], torch.arange(len(heads.units)) % 3 == 0
    heads.detach()
    counts = []

    def make(choose):
        arguments = dict(methods=["head", "head-static"], samples=2, choose=choose, include_path=str(tasks))
        return TaskEvaluation(model, tokenizer, [str(tmp_path / "heads")], ["flux_choice"], **arguments)

    rows = list(make(lambda routing, count, tell: counts.append(count) or chosen).rows())
    assert [row["method"] for row in rows] == ["head", "head-static"]
    assert counts == [len(names)] and rows[0]["sparsity"] == 0  # fresh routers are full
    full = [name for name, on in zip(names, chosen.tolist(), strict=True) if on]
    assert rows[1]["full_heads"] == full and [name for name, rate in rows[1]["fa_rate"].items() if rate] == full
    again = list(make(lambda *args: 1 / 0).rows(rows))
    assert again == rows
    forced = []
    late = make(lambda routing, count, tell: forced.append(routing.settings.forced) or chosen)
    late.methods.append("sparse")  # measured behind the rows that are there
    assert [row["method"] for row in late.rows(rows[:1])] == ["sparse", "head", "head-static"] and forced == [None]


def test_layers_drawn_for_a_context_are_its_own(tasks, short_adapter):
    """All continuations of a context have the same ones, in whatever batch; another context has others."""
    model, tokenizer, routing = load_shipped()
    routing.detach()
    lm = FluxLM(model, routers=short_adapter, tokenizer=tokenizer, batch_size=2)
    lm.drawn = 3
    try:
        for context in ([1, 2, 3], [1, 2, 4]):
            lm._loglikelihood_tokens([(("", ""), context, [5 + n, 9]) for n in range(3)], disable_tqdm=True)
    finally:
        lm.routing.detach()
    one, other = lm.routed[:3], lm.routed[3:]
    assert one == [one[0]] * 3 and other == [other[0]] * 3 and one[0] != other[0]
    assert sum(one[0]) == sum(other[0]) == 3


def test_rows_of_results():
    """A mean of scores between 0 and 1, a perplexity, and RULER's lengths, of which -1 were not asked for."""
    results = {
        "n-samples": {name: {"original": 9, "effective": 2} for name in ("rouge", "text", "niah")},
        "results": {
            "rouge": {"alias": "rouge", "rouge,none": 0.25, "rouge_stderr,none": 0.05, "sample_len": 2},
            "text": {"word_perplexity,none": 8.5, "word_perplexity_stderr,none": "N/A", "bits_per_byte,none": 0.7},
            "niah": {"8192,none": -1, "8192_stderr,none": "N/A", "4096,none": 1.0, "4096_stderr,none": "N/A"},
            "a_group": {"rouge,none": 0.25},
        },
        "samples": {
            "rouge": [{"doc_id": 1, "rouge": 0.2}, {"doc_id": 0, "rouge": 0.3}],
            "text": [{"doc_id": 0, "word_perplexity": (3.0, 2)}, {"doc_id": 1, "word_perplexity": (4.0, 2)}],
            "niah": [
                {"doc_id": 1, "4096": 1.0, "filter": "none"},
                {"doc_id": 0, "4096": 0.0, "filter": "none"},
                {"doc_id": 0, "4096": 7.0, "filter": "other"},
            ],
        },
    }
    rouge, text, niah = _task_rows(results)
    assert (rouge["task"], rouge["n"], rouge["accuracy"]) == ("rouge", 2, 0.25) and "scores" not in rouge
    assert (rouge["low"], rouge["high"]) == (0.152, 0.348)
    assert text["perplexity"] == 8.5 and text["low"] is None and "accuracy" not in text
    assert text["metrics"] == {"word_perplexity": 8.5, "bits_per_byte": 0.7}
    assert niah["metric"] == "4096" and niah["scores"] == [0, 1] and niah["metrics"] == {"4096": 1.0}


def test_flux_attention_eval(tasks, tmp_path, own_tasks_only):
    command = ["eval", "shipped", "--tasks", "flux_choice", "--device", "cpu", "--dtype", "float32"]
    command += ["--include-path", str(tasks), "--samples", "2", "--methods", "dense,routed", "--output", str(tmp_path)]
    result = flux(*command)
    assert result.returncode == 0, result.stderr
    rows = json.loads((tmp_path / "quality.json").read_text())["rows"]
    assert [(row["task"], row["method"], row["n"]) for row in rows] == [
        ("flux_choice", "dense", 2),
        ("flux_choice", "routed", 2),
    ]
    assert "flux_choice" in (tmp_path / "report.html").read_text()
    result = flux(*command, "--families", "count")
    assert result.returncode == 1 and "--tasks and --families are both there" in result.stderr


def test_force(shipped, short_adapter):
    assert [_parse_force(force) for force in (None, "full", "sparse", 0.75, "0.75", 3, "3", "3;7", [3, 7])] == [
        *(None, "full", "sparse", 0.75, 0.75),
        *([3], [3], [3, 7], [3, 7]),
    ]
    for force in ("none of it", "3,7", True):
        with pytest.raises(ValueError, match="cannot force"):
            _parse_force(force)
    for force in (1.5, "3;70"):
        with pytest.raises(ValueError, match="cannot force"):
            FluxLM(str(BACKBONE), routers=short_adapter, force=force, **ARGUMENTS)


def test_without_lm_eval(monkeypatch):
    name = "flux_attention.evaluation.lm_harness"
    monkeypatch.delitem(sys.modules, name)
    for module in [module for module in sys.modules if module.split(".")[0] == "lm_eval"]:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"pip install 'flux-attention\[eval\]'"):
        importlib.import_module(name)
