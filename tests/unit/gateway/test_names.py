"""Names of models: what each stands for, and which can't be."""

from __future__ import annotations

import pytest

from bucketserve.core.errors import SettingsError, UnknownModelError
from bucketserve_gateway.models import ModelCatalog
from bucketserve_gateway.names import ModelNames
from tests.unit.gateway.builders import catalog


def test_a_name_stands_for_a_model_and_an_alias_for_the_same() -> None:
    names = ModelNames(["small", "big"], {"latest": "big", "org/big": "big", "quick": "small"})
    meant = {"small": "small", "big": "big", "latest": "big", "org/big": "big", "quick": "small"}
    assert {name: names.resolve(name) for name in meant} == meant
    assert names.aliases_of("big") == ("latest", "org/big")
    assert names.aliases_of("small") == ("quick",)


@pytest.mark.parametrize("name", ["", "Latest", "latest ", "lat", "big/latest", "x" * 10_000, "\ud800", "\0"])
def test_what_is_no_name_stands_for_itself(name: str) -> None:
    assert ModelNames(["small", "big"], {"latest": "big"}).resolve(name) == name


def test_no_name_is_the_only_model_whatever_its_aliases() -> None:
    assert ModelNames(["demo"], {"a": "demo", "b": "demo"}).resolve("") == "demo"
    assert ModelNames([]).resolve("") == ""


@pytest.mark.parametrize(
    ("aliases", "problem"),
    [
        ({"demo": "demo"}, "'demo' is a model's own name"),
        ({"demo": "big"}, "'demo' is a model's own name"),
        ({"a": "a"}, "'a' is for the alias 'a'"),
        ({"a": "b", "b": "a"}, "'a' is for the alias 'b'"),
        ({"a": "b", "b": "demo"}, "'a' is for the alias 'b'"),
        ({"a": "nobody"}, "'a' is for 'nobody', which is no model here; served: big, demo"),
        ({"a": ""}, "'a' is for '', which is no model here"),
        ({"": "demo"}, "'' is no name"),
        ({"a\nb": "demo"}, r"'a\\nb' is no name"),
        ({"\ud800": "demo"}, r"'\\ud800' is no name"),
        ({"x" * 129: "demo"}, "is no name: 1 to 128 printable characters"),
    ],
)
def test_an_alias_that_means_two_things_or_nothing_is_refused(aliases: dict[str, str], problem: str) -> None:
    with pytest.raises(SettingsError, match=problem):
        ModelNames(["demo", "big"], aliases)


@pytest.mark.parametrize("name", ["", "x" * 129, "a\tb", "\ud800"])
def test_a_model_needs_a_name(name: str) -> None:
    with pytest.raises(SettingsError, match=r"\[gateway\] models: .* is no name"):
        ModelNames(["demo", name])


def test_everything_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(SettingsError) as caught:
        ModelNames(["demo"], {"demo": "x", "a": "b", "c": "d"})
    assert len(caught.value.problems) == 3


def two() -> ModelCatalog:
    models = {name: catalog(name).get(name) for name in ("demo", "big")}
    return ModelCatalog(models, ModelNames(models, {"latest": "big"}))


def test_a_catalogue_knows_models_by_their_aliases_and_says_what_it_knows() -> None:
    found = two()
    assert found.get("latest") is found.get("big")
    with pytest.raises(UnknownModelError, match=r"^unknown model 'x'; served: big, demo, latest$"):
        found.get("x")
    with pytest.raises(UnknownModelError, match=r"^name a model: several are served here: big, demo, latest$"):
        found.get("")
