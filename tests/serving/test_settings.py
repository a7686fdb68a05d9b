"""What a server is told: settings, and the wishes of requests."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flux_attention import FluxConfig
from flux_attention.errors import FluxConfigError, ServingError
from flux_attention.serving.requests import Wish
from flux_attention.serving.settings import VARIABLE, Settings

LAYERS = (0, 2, 5, 7)
RANKED = FluxConfig(ranking=LAYERS, budget=0.5)


PLAIN = FluxConfig()


def wish(config=PLAIN, **arguments):
    return Wish.of(SimpleNamespace(extra_args=arguments), config, LAYERS)


def test_an_adapter_is_named_by_the_environment_or_by_the_configuration(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    assert Settings.read(None) is Settings.read({"other": 1}) is None
    monkeypatch.setenv(VARIABLE, "here")
    assert Settings.read({}) == Settings("here")
    found = Settings.read({"flux_attention": {"routers": "there", "budget": 1}, "other": 2})
    assert found == Settings("there", 1.0)
    assert Settings.read(found.to_dict()) == found


@pytest.mark.parametrize(
    "given, message",
    [
        ({"budget": 0.5}, "names no adapter"),
        ({"routers": "here", "sink": 3}, r"unknown keys \['sink'\]"),
        ({"routers": "here", "budget": "half"}, "budget is 'half'"),
        ({"routers": "here", "debug": 1}, "debug is 1"),
        ({"routers": "here", "decide": "later"}, "decide is 'later'"),
    ],
)
def test_settings_that_mean_nothing_are_refused(given, message, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(ServingError, match=message):
        Settings.read({"flux_attention": given})


def test_what_is_served_reads_the_ends_and_has_patterns_that_there_are_kernels_for():
    assert Settings("here").served(FluxConfig(pool_size=200)).end_tokens == 200
    assert Settings("here").served(FluxConfig()).decide == "ends"
    assert Settings("here", decide="prefill").served(FluxConfig()).decide == "prefill"
    assert Settings("here").served(RANKED) == RANKED
    assert Settings("here", 0.25).served(RANKED).full_layers == (0, 2, 5)
    for config, message in (
        (FluxConfig(pattern="triangle"), "compute triangle"),
        (FluxConfig(sparse=FluxConfig().sparse | {"block_size": 128}), "round to blocks of 128 tokens"),
        (FluxConfig(granularity="head"), "decide by head"),
    ):
        with pytest.raises(ServingError, match=message):
            Settings("here").served(config)
    with pytest.raises(FluxConfigError, match="not trained with one"):
        Settings("here", 0.5).served(FluxConfig())


def test_a_request_may_force_routes_or_ask_for_a_budget():
    assert wish() == Wish(None, None)
    assert wish(RANKED) == Wish(None, 0.5)
    assert wish(RANKED, flux_budget=1) == Wish(None, 1.0)
    assert wish(flux_routes="sparse").routes == "sparse"
    assert wish(flux_routes="0.75").routes == wish(flux_routes=0.75).routes == 0.75
    assert wish(flux_routes=1).routes == 1.0
    assert wish(flux_routes="2,7").routes == wish(flux_routes=[2, 7]).routes == [2, 7]
    assert wish(temperature=3) == Wish.of(None, FluxConfig(), LAYERS) == Wish(None, None)


@pytest.mark.parametrize(
    "config, arguments, message",
    [
        (RANKED, {"flux_budget": 1.5}, "between 0 and 1"),
        (RANKED, {"flux_budget": True}, "between 0 and 1"),
        (PLAIN, {"flux_budget": 0.5}, "take no budget"),
        (PLAIN, {"flux_routes": "most"}, "cannot force 'most'"),
        (PLAIN, {"flux_routes": 1.5}, "1.5"),
        (PLAIN, {"flux_routes": [3]}, "3"),
        (PLAIN, {"flux_routes": {"a": 1}}, "expected full, sparse"),
        (RANKED, {"flux_routes": "full", "flux_budget": 0.5}, "both there"),
        (PLAIN, {"flux_route": "full"}, "unknown arguments"),
    ],
)
def test_wishes_that_mean_nothing_are_refused(config, arguments, message):
    with pytest.raises(ServingError, match=message):
        wish(config, **arguments)


@given(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(),
        st.lists(st.one_of(st.none(), st.integers(), st.floats(), st.text(), st.lists(st.integers()))),
    )
)  # fmt: skip
def test_whatever_a_request_wishes_is_understood_or_refused_in_words(value):
    for name in ("flux_routes", "flux_budget"):
        try:
            wish(RANKED, **{name: value})
        except ServingError as error:
            if name not in str(error):
                raise
