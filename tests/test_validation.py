"""Checked dataclasses: every mistake is told by the class's own error, in one form."""

from typing import Annotated

import pytest
from pydantic import Field
from pydantic.dataclasses import dataclass

from flux_attention.validation import NO_OTHER_KEYS, Positive, Text, check_known, checked, expected, from_keys


class OvenError(ValueError):
    pass


@checked(OvenError, within="oven")
@dataclass(frozen=True, config=NO_OTHER_KEYS)
class Oven:
    name: Text
    shelves: Positive = 2
    heats: Annotated[dict[str, Annotated[float, Field(le=9), expected("a heat up to 9")]], expected("heats")] = Field(
        default_factory=dict
    )

    def __post_init__(self):
        if self.shelves == 13:
            raise OvenError("13 shelves bring bad luck")


@checked(OvenError)
@dataclass
class Kitchen:
    oven: Annotated[Oven | None, from_keys(Oven), expected("an oven")] = None


@pytest.mark.parametrize(
    "values, message",
    [
        (dict(shelvs=3, names=1), r"unknown keys \['names', 'shelvs'\] in oven; known keys are \['name', 'shelves', "),
        (dict(shelves=0), r"oven is incomplete: missing keys \['name'\]"),
        (dict(name=b"x"), "oven.name is b'x', expected text"),
        (dict(name="x", shelves=True), "oven.shelves is True, expected a whole number, at least 1"),
        (dict(name="x", heats={"a": 1, "b": 10}), "oven.heats: 'b' is 10, expected a heat up to 9"),
        (dict(name="x", heats=3), "oven.heats is 3, expected heats"),
        (dict(name="x", shelves=13), "13 shelves bring bad luck"),
    ],
)
def test_mistakes_are_named_wherever_the_object_stands(values, message):
    for make in (lambda: Oven(**values), lambda: Kitchen(values), lambda: Kitchen(oven=dict(values))):
        with pytest.raises(OvenError, match=f"^{message}"):
            make()


def test_what_fits_is_taken_as_given():
    oven = Oven("x", 3, {"a": 1})
    assert (oven.name, oven.shelves, oven.heats) == ("x", 3, {"a": 1})
    assert Kitchen(oven).oven is oven and Kitchen({"name": "x"}).oven == Oven("x") and Kitchen().oven is None
    with pytest.raises(OvenError, match=r"^oven is 3, expected an oven"):
        Kitchen(3)
    with pytest.raises(OvenError, match=r"^Kitchen takes 1 values, but found 2 more"):
        Kitchen(None, 2, 3)
    with pytest.raises(OvenError, match=r"^unknown keys \['1'\] in oven"):
        Kitchen({1: 2, "name": "x"})


def test_known():
    check_known("fruit", ["pear"], ["pear", "plum"])
    with pytest.raises(ValueError, match=r"unknown fruit \['fig'\], expected some of \['pear', 'plum'\]"):
        check_known("fruit", ["fig", "plum"], ["pear", "plum"])
