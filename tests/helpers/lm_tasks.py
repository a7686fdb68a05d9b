"""Tasks for lm-eval that need no download, and an index of nothing else."""

import functools
import json

import pytest


def context(code, lines=26):
    """About 11 tokens a line. Sparse layers do not see the code: it is behind the sink and before the window."""
    text = [f"x{index} = compute({index})" for index in range(lines)]
    text.insert(10, f"# The secret code of the silver whale is {code}.")
    return "\n".join(text) + "\n# Question: What is the secret code of the silver whale?\n# Answer:"


CONTEXTS = [context(48213), context(77015, lines=18), "# Answer:"]


@pytest.fixture(scope="session")
def tasks(tmp_path_factory):
    """A folder with a multiple-choice and a generation task on local data."""
    folder = tmp_path_factory.mktemp("tasks")
    documents = [
        {"text": text, "choices": [" 48213", " 77015", " 4"], "gold": gold} for gold, text in enumerate(CONTEXTS)
    ]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, documents)))
    data = f"""
dataset_path: json
dataset_kwargs:
  data_files: {{test: {folder / "data.jsonl"}}}
  cache_dir: {folder / "cache"}
test_split: test
doc_to_text: "{{{{text}}}}"
"""
    (folder / "choice.yaml").write_text(
        f"task: flux_choice\noutput_type: multiple_choice\n{data}"
        'doc_to_choice: "{{choices}}"\ndoc_to_target: gold\ntarget_delimiter: ""\nmetric_list: [{metric: acc}]\n'
    )
    (folder / "answer.yaml").write_text(
        f"task: flux_answer\noutput_type: generate_until\n{data}"
        'doc_to_target: "{{choices[gold]}}"\ntarget_delimiter: ""\nmetric_list: [{metric: exact_match}]\n'
        'generation_kwargs: {until: ["\\n"], max_gen_toks: 6, do_sample: false}\n'
    )
    return folder


@pytest.fixture
def own_tasks_only(monkeypatch):
    """An index of lm-eval's thousands of tasks takes ten seconds to build."""
    from lm_eval.tasks import TaskManager

    from flux_attention.evaluation import lm_harness

    monkeypatch.setattr(lm_harness, "TaskManager", functools.partial(TaskManager, include_defaults=False))
