"""What can be measured with which adapters."""

import pytest

from flux_attention import FluxConfig
from flux_attention.evaluation.methods import DEFAULT_METHODS, METHODS, NATURAL_METHODS, check_methods, missing

ROUTERS, HEADS = FluxConfig(), FluxConfig(granularity="head")
RANKING = FluxConfig(ranking=(1, 0), budget=0.5)


def possible(configs, budgets=None, force=()):
    return {method for method in METHODS if missing(method, configs, budgets, force) is None}


def test_each_method_has_what_it_needs():
    sets = {"static", "best-static", "best-static-fewer", "random"}
    assert possible([]) == {"dense", "sparse"}
    assert possible([], force=["0.5"]) == {"dense", "sparse", "forced"}
    assert possible([], [0.5]) == {"dense", "sparse", *sets}
    assert possible([ROUTERS]) == {"dense", "sparse", "routed", "routed-ends", *sets}
    assert possible([HEADS]) == {"dense", "sparse", "head", "head-static", *sets}
    assert possible([RANKING]) == {"dense", "sparse", "static-nll"}
    assert possible([RANKING, ROUTERS], [0.5], ["3"]) == set(METHODS) - {"head", "head-static"}


def test_what_lacks_something_and_budgets_without_use_are_refused():
    check_methods(["dense", "static"], [], [0.5], [])
    check_methods(["dense", "static-nll"], [RANKING, ROUTERS], [0.5], [])
    for methods, configs, budgets in (
        (["routed"], [RANKING], None),
        (["static-nll"], [ROUTERS], None),
        (["forced"], [], None),
        (["static"], [RANKING], None),
    ):
        with pytest.raises(ValueError, match=f"the method {methods[0]} needs "):
            check_methods(methods, configs, budgets, [])
    for methods, configs in ((["dense"], []), (["static"], [ROUTERS]), (["dense"], [RANKING])):
        with pytest.raises(ValueError, match="budgets are for adapters with a ranking"):
            check_methods(methods, configs, [0.5], [])


def test_the_search_is_no_default_for_real_models():
    assert "static" in DEFAULT_METHODS and set(DEFAULT_METHODS) - set(NATURAL_METHODS) == {"static"}
    assert not {"best-static", "best-static-fewer", "routed-ends"} & set(DEFAULT_METHODS)
