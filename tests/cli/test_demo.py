"""The demo's output."""

import json
from unittest import mock

from helpers.command import flux

from flux_attention.shipped import demo


def test_demo_shows_every_family():
    arguments, measured = ["demo", "--samples", "1", "--length", "1024", "--seed", "3"], []

    def run_demo(*options):
        if not measured:  # the second call would measure the same again
            measured.extend(real(*options))
        return measured

    real = demo.run_demo
    with mock.patch.object(demo, "run_demo", run_demo):
        result = flux(*arguments)
        rows = json.loads(flux(*arguments, "--json").stdout)
    assert result.returncode == 0, result.stderr
    for shown in (
        "one fact in the text",
        "two look-ups",
        "how often",
        "perplexity",
        "layers full",
        "Ω_MSR",
        "answered",
    ):
        assert shown in result.stdout, shown
    assert len(rows) == 21 and rows == measured and {row["method"] for row in rows} == {"dense", "routed", "sparse"}
    assert len({row["task"] for row in rows}) == 7
