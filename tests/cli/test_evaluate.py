"""``eval`` on a model of its own: without adapters, by a ranking, by routers, on records."""

import json

import pytest
import torch
from helpers.command import flux
from helpers.models import randomize
from transformers import AutoModelForCausalLM, AutoTokenizer

from flux_attention import FluxConfig, attach
from flux_attention.evaluation.base import adapter_hash
from flux_attention.evaluation.material import Material
from flux_attention.tasks import generation
from flux_attention.tasks.metrics import edit

SIZES = ["--lengths", "400", "--samples", "2"]
PATTERN = ["--sink", "8", "--window", "24"]


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory):
    """A ranking and routers for the tiny model, as folders."""
    model, folder = AutoModelForCausalLM.from_pretrained(base), tmp_path_factory.mktemp("adapters")
    for name, more in (("ranking", dict(ranking=(2, 0, 1), budget=0.34)), ("routers", dict(pool_size=16))):
        routing = attach(model, FluxConfig(sink=8, window=24, **more))
        randomize(routing)
        routing.save_pretrained(folder / name)
        routing.detach()
    return folder


def judged(base, output, *options):
    result = flux("eval", base, "--output", output, *options)
    assert result.returncode == 0, result.stderr
    rows = json.loads((output / "quality.json").read_text())["rows"]
    return result.stdout, rows


def test_without_adapters_dense_sparse_and_forced_sets_are_judged(base, tmp_path):
    families = ["--families", "completion,prose"]
    forced = ["--force", "0.34", "--force", "1"]
    said, rows = judged(base, tmp_path, *families, *SIZES, *PATTERN, *forced)
    kinds = [(row["task"], row["method"], row.get("force"), row["sparsity"]) for row in rows]
    assert kinds == [
        (task, *kind)
        for kind in (
            ("dense", None, 0.0),
            ("sparse", None, 1.0),
            ("forced", "0.34", 0.3333),
            ("forced", "1", 0.6667),
        )
        for task in ("completion", "prose")
    ]
    assert rows[-2]["full_layers"] == [1] and rows[-2]["fa_rate"] == {"0": 0.0, "1": 1.0, "2": 0.0}
    assert all(row["n"] == len(row["scores"]) == 2 and row["model"] == base.name for row in rows)
    assert (rows[0]["task_class"], rows[0]["metric"], rows[1]["metric"]) == ("code", "edit", "perplexity")
    assert "code" in said and "forced 0.34" in said
    # The same by hand, one by one, where the row's were generated with the cache's layers forced.
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base).eval(), AutoTokenizer.from_pretrained(base)
    routing = attach(model, FluxConfig(sink=8, window=24))
    scores = []
    for sample in Material(tokenizer, ["completion"]).make("completion", 400, 2):
        prompt = torch.tensor(sample.prompt_ids)[None].long()
        options = dict(attention_mask=torch.ones_like(prompt), do_sample=False, pad_token_id=0)
        with routing.force([1]):
            output = model.generate(prompt, max_new_tokens=len(sample.answer_ids) * 3 // 2 + 24, **options)
        text = tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True)
        scores.append(round(edit(text, sample.question.expected), 4))
    assert rows[-2]["scores"] == scores and sum(scores) > 0


def test_lengths_at_which_nothing_is_saved_are_named(base, tmp_path):
    options = ["--families", "prose", "--methods", "dense,sparse", *SIZES]
    for window, note in (("500", True), ("24", False)):
        said, rows = judged(base, tmp_path / window, *options, "--sink", "8", "--window", window)
        pages = [(tmp_path / window / f"report.{kind}").read_text() for kind in ("md", "html")]
        assert all(("Nothing is saved at 400 tokens" in " ".join(text.split())) == note for text in (said, *pages))
        assert (rows[1]["scores"] == rows[0]["scores"]) == note and rows[1]["sparsity"] == 1
        assert (rows[1]["esr"] == 0) == note


def test_a_ranking_is_judged_at_budgets_and_a_run_goes_on_with_more(base, adapters, tmp_path, monkeypatch):
    options = ["--routers", adapters / "ranking", "--families", "place,prose", *SIZES]
    said, rows = judged(base, tmp_path, *options)
    assert rows[0]["accuracy"] == 0 and "has a star" in " ".join(said.split())
    assert [row["method"] for row in rows[::2]] == ["dense", "sparse", "static-nll"]
    assert (rows[-1]["budget"], rows[-1]["full_layers"], rows[-1]["sparsity"]) == (0.34, [0, 2], 0.3333)

    told, real = [], generation.generate_answers
    monkeypatch.setattr(generation, "generate_answers", lambda *a, **k: told.append(k["routes"]) or real(*a, **k))
    said, more = judged(base, tmp_path, *options, "--budgets", "0.34,0.67,1")
    assert told == [[2], "sparse"]  # what was there is not measured again
    assert [row["budget"] for row in more if row["task"] == "place" and "budget" in row] == [0.34, 0.67, 1.0]
    assert more[:6] == rows and "static-nll (ranking) at 0.67" in (tmp_path / "report.md").read_text()
    prose = {row.get("budget", row["method"]): row["scores"] for row in more if row["task"] == "prose"}
    assert prose[1.0] == prose["sparse"] != prose[0.34]


def test_static_and_random_sets_have_a_budgets_layers_where_there_are_no_routers(base, tmp_path):
    options = ["--families", "prose", *SIZES, *PATTERN, "--methods", "dense,static,random", "--budgets", "0.34,0.67"]
    _, rows = judged(base, tmp_path, *options, "--calibration", "1")
    assert [(row["method"], row.get("budget"), row["sparsity"]) for row in rows] == [
        ("dense", None, 0.0),
        ("static", 0.34, 0.3333),
        ("random", 0.34, 0.3333),
        ("static", 0.67, 0.6667),
        ("random", 0.67, 0.6667),
    ]
    assert set(rows[3]["full_layers"]) < set(rows[1]["full_layers"])  # greedy, on the same samples
    _, again = judged(base, tmp_path, *options, "--calibration", "1")
    assert again == rows


def test_routers_decide_in_the_prefill_and_by_the_ends(base, adapters, tmp_path):
    options = ["--routers", adapters / "routers", "--routers", adapters / "ranking", "--families", "prose", *SIZES]
    methods = "dense,routed,routed-ends,static-nll"
    _, rows = judged(base, tmp_path, *options, "--methods", methods, "--batch-size", "2")
    assert [row["method"] for row in rows] == ["dense", "routed", "routed-ends", "static-nll"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base).eval(), AutoTokenizer.from_pretrained(base)
    samples = Material(tokenizer, ["prose"]).make("prose", 400, 2)
    for row, decide in ((rows[1], "prefill"), (rows[2], "ends")):
        routing = attach(model, adapters / "routers", decide=decide)
        with torch.no_grad():
            for sample in samples:
                model(torch.tensor(sample.prompt_ids)[None].long())
                row["sparsity"] -= routing.routes.msr[0] / 2
        routing.detach()
        assert row["sparsity"] == pytest.approx(0, abs=1e-4)
    assert "routed-ends (routers)" in (tmp_path / "report.md").read_text()


def test_records_are_judged_by_their_tasks(base, tmp_path):
    records = [
        {"context": f"The number is {index}. " * 9, "question": "Which number?", "answer": str(index), **more}
        for index, more in enumerate([{}, {"metadata": {"task": "Single QA"}}, {}, {}])
    ]
    path = tmp_path / "records.jsonl"
    path.write_text("\n".join(map(json.dumps, [*records, {"text": "A plain text, which is scored. " * 9}])))
    said, rows = judged(base, tmp_path / "o", "--records", path, *PATTERN, "--samples", "2")
    assert [(row["task"], row["n"]) for row in rows if row["method"] == "dense"] == [
        ("records", 2),
        ("Single QA", 1),
        ("prose", 1),
    ]
    assert {row["seq_len"] for row in rows} == {rows[0]["seq_len"]} and "Single QA" in said
    path.write_text(json.dumps(records[0] | {"answer": "5"}))
    changed = flux("eval", base, "--output", tmp_path / "o", "--records", path, *PATTERN, "--samples", "2")
    assert changed.returncode == 1 and "other settings (families, lengths, records" in changed.stderr
    long = flux("eval", base, "--output", tmp_path / "p", "--records", path, "--lengths", "256", *PATTERN)
    assert long.returncode == 0, long.stderr
    path.write_text(json.dumps(records[0] | {"context": "word " * 600}))
    long = flux("eval", base, "--output", tmp_path / "p", "--records", path, *PATTERN)
    assert long.returncode == 1 and "expected at most 512: shorten it" in long.stderr


def test_a_chat_template_makes_questions_in_words_the_default(base, tmp_path, monkeypatch):
    from flux_attention.evaluation import run
    from flux_attention.tasks.families import EVERY_FAMILY
    from flux_attention.tasks.questions import NATURAL

    asked = []

    def stop(*arguments, families, methods, **more):
        asked.append((families, methods))
        raise ValueError("seen")

    monkeypatch.setattr(run, "run_evaluation", stop)
    assert flux("eval", base, *SIZES).returncode == 1
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(tmp_path / "chat")
    tokenizer.save_pretrained(tmp_path / "chat")
    for options in ([], ["--chat"], ["--no-chat"]):
        assert flux("eval", tmp_path / "chat", *SIZES, *options).stderr.endswith("seen\n")
    token, words = list(EVERY_FAMILY), list(NATURAL)
    assert [families for families, _ in asked] == [token, words, words, token]
    assert asked[1][1] == ["dense", "sparse"]


def test_adapters_without_weights_have_a_hash(adapters, tmp_path):
    ranking, routers = (adapter_hash(str(adapters / name)) for name in ("ranking", "routers"))
    assert ranking and routers and ranking != routers and adapter_hash(str(tmp_path)) is None
    text = (adapters / "ranking" / "flux_config.json").read_text()
    (tmp_path / "flux_config.json").write_text(text.replace("0.34", "0.67"))
    assert adapter_hash(str(tmp_path)) not in (None, ranking)
