"""A whole evaluation: rows and report of questions; of tasks, where static layers come from."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from flux_attention import FluxConfig
from flux_attention.evaluation import material, quality, run
from flux_attention.evaluation.run import run_evaluation
from flux_attention.shipped import load_shipped
from flux_attention.tasks.corpus import local_corpus

TEXT = "def f(x):\n    return x\n" * 400


@pytest.fixture(scope="module")
def shipped():
    """The shipped model without routers."""
    model, tokenizer, routing = load_shipped()
    routing.detach()
    return model, tokenizer


def test_questions_are_measured_once_and_reported(shipped, short_adapter, tmp_path, monkeypatch):
    sizes = dict(families=["plain"], lengths=[256], methods=["dense", "routed"], samples=2, text=TEXT)
    told = []
    rows, page = run_evaluation(*shipped, [short_adapter], tmp_path, **sizes, progress=lambda *far: told.append(far))
    assert [(row["task"], row["method"], row["n"]) for row in rows] == [("plain", "dense", 2), ("plain", "routed", 2)]
    assert json.loads((tmp_path / "quality.json").read_text())["rows"] == rows
    assert page.read_text().startswith("<!") and page.parent == tmp_path
    assert [(what, done, total) for what, done, total, *_ in told] == [("answering", n, 4) for n in (0, 1, 2, 2, 3, 4)]
    assert told[-1][3:] == ("256 tokens, plain: routed", 1.0)
    monkeypatch.setattr(quality, "evaluate", None)  # nothing is measured again
    assert run_evaluation(*shipped, [short_adapter], tmp_path, **sizes)[0] == rows


def test_other_packages_make_other_questions_which_is_said(base, tmp_path, monkeypatch):
    """In words, made of a corpus, and hidden in text: a run does not go on with either, and says what has happened."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    pattern = FluxConfig(sink=8, window=24)
    sizes = dict(families=["prose", "plain"], lengths=[64], methods=["dense"], samples=2, config=pattern)

    def judge(**more):
        return run_evaluation(model, tokenizer, [], tmp_path, **sizes, **more)[0]

    monkeypatch.setattr(run, "local_texts", lambda *_, **__: (TEXT,))
    rows = judge()
    assert judge() == rows
    refusal = r"other settings \(text\): use another folder, or --restart. text: .* packages are installed or removed"
    installed = replace(local_corpus("test"), prose=(*local_corpus("test").prose, ("A paragraph of a new package.",)))
    with monkeypatch.context() as changed:
        changed.setattr(material, "local_corpus", lambda split: installed)
        with pytest.raises(ValueError, match=refusal):
            judge()
    monkeypatch.setattr(run, "local_texts", lambda *_, **__: (TEXT, "import new_package\n" * 99))
    with pytest.raises(ValueError, match=refusal):
        judge()
    assert judge(text=TEXT) == rows
    assert len(judge(restart=True)) == 2


@pytest.mark.parametrize("granularity, chosen", [("layer", "layers"), ("head", "heads")])
def test_static_layers_of_tasks_are_chosen_on_questions(shipped, tmp_path, monkeypatch, granularity, chosen):
    lm_harness = pytest.importorskip("flux_attention.evaluation.lm_harness")
    asked = []

    class Tasks:
        def __init__(self, model, tokenizer, adapters, tasks, methods, samples, batch_size, choose, path, **shared):
            asked.append((tasks, methods, samples, batch_size, path, shared))
            self.choose = choose

    def chooser(name):
        def choose(questions, routing, length, count, tell):
            return name, questions.families, length, count, questions.calibration

        return choose

    routing = SimpleNamespace(config=SimpleNamespace(granularity=granularity))
    monkeypatch.setattr(lm_harness, "TaskEvaluation", Tasks)
    monkeypatch.setattr(quality.Evaluation, "static_layers", chooser("layers"))
    monkeypatch.setattr(quality.Evaluation, "static_heads", chooser("heads"))
    monkeypatch.setattr(quality, "run", lambda evaluation, *_, **__: evaluation.choose(routing, 3, print))
    monkeypatch.setattr(run, "write_report", lambda results, folder, baseline, command: (folder / "report.html", None))
    rows, _ = run_evaluation(
        *shipped,
        ["adapter"],
        tmp_path,
        tasks=["a task"],
        include_path=tmp_path,
        text=TEXT,
        families=["copy"],
        lengths=[512, 1024],
        methods=["static"],
        samples=4,
        calibration=5,
        batch_size=6,
        budgets=[0.5],
        force=["0.25"],
    )
    assert asked == [(["a task"], ["static"], 4, 6, tmp_path, dict(config=None, budgets=[0.5], force=["0.25"]))]
    assert rows == (chosen, ["copy"], 512, 3, 5)
