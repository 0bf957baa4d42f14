"""Names of adapters, the models that they are shown as, and the keys that are for them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bucketserve.core.errors import ForbiddenError, UnknownModelError
from bucketserve.v1 import inference_pb2, scheduler_pb2
from bucketserve_gateway.adapters import ABSENT_S, AdapterBook, split_adapter
from bucketserve_gateway.auth import Identity
from bucketserve_gateway.keys import Scope
from bucketserve_gateway.models import ModelCatalog
from bucketserve_gateway.names import ModelNames
from bucketserve_gateway.prefixes import block_hashes, prefix_salt
from tests.unit.gateway import builders

HOSTILE = [
    "demo:",
    ":x",
    ":",
    "::",
    "demo::x",
    "demo:x:",
    "demo:x:y",
    "demo:x ",
    "demo:X",
    "demo:../x",
    "demo:x/..",
    "demo:x\0",
    "demo:\u202ex",
    "demo:х",  # Cyrillic
    "demo:" + "x" * 100_000,
    "other:x",
    "x",
]


def served(*entries: tuple[str, str]) -> scheduler_pb2.ServedAdapters:
    return scheduler_pb2.ServedAdapters(
        adapters=[scheduler_pb2.Adapter(name=name, fingerprint=fingerprint) for name, fingerprint in entries]
    )


def catalog(*names: str) -> ModelCatalog:
    return ModelCatalog({name: builders.catalog(name).get(name) for name in names})


@given(st.text(), st.text())
def test_a_name_is_split_at_its_last_colon_or_not_at_all(model: str, adapter: str) -> None:
    base, found = split_adapter(f"{model}:{adapter}")
    assert bool(base) == bool(found)
    assert not base or (f"{base}:{found}" == f"{model}:{adapter}" and ":" not in found)
    assert split_adapter(model.replace(":", "")) == ("", "")


def test_an_adapter_is_its_model_under_another_name() -> None:
    models = catalog("demo")
    models.adapters.announced("demo", served(("x", "F1"), ("a", "F2")))
    models.adapters.announced("gone", served(("x", "F3")))
    base, found = models.get("demo"), models.get("demo:x")
    assert (found.card.name, found.card.parent, found.base_name, found.adapter) == ("demo:x", "demo", "demo", "F1")
    assert (base.card.parent, base.base_name, base.adapter) == ("", "demo", "")
    assert found.tokenizer is base.tokenizer
    assert [card.name for card in models.cards()] == ["demo", "demo:a", "demo:x"]
    assert models.get("") is base
    assert models.models() == [base]


@pytest.mark.parametrize("name", HOSTILE, ids=lambda name: ascii(name)[:20])
def test_what_is_no_adapter_is_refused_with_what_is_served(name: str) -> None:
    models = catalog("demo")
    models.adapters.announced("demo", served(("x", "F1")))
    with pytest.raises(UnknownModelError, match=r"served: demo, demo:x$"):
        models.get(name)


def test_a_model_of_that_very_name_is_what_is_meant() -> None:
    models = catalog("llama", "llama:8b")
    models.adapters.announced("llama", served(("8b", "F1")))
    models.adapters.announced("llama:8b", served(("x", "F2")))
    assert models.get("llama:8b").adapter == ""
    assert models.get("llama:8b:x").adapter == "F2"
    assert [card.name for card in models.cards()] == ["llama", "llama:8b", "llama:8b:x"]
    with pytest.raises(UnknownModelError):
        models.get("llama:x")


def test_an_alias_has_the_adapters_of_its_model_and_comes_before_them() -> None:
    names = ModelNames(["demo"], {"chat": "demo", "demo:y": "demo"})
    models = ModelCatalog({"demo": builders.catalog("demo").get("demo")}, names)
    models.adapters.announced("demo", served(("x", "F1"), ("y", "F2")))
    found = models.get("chat:x")
    assert (found.card.name, found.card.aliases, found.adapter) == ("demo:x", (), "F1")
    assert models.get("demo:y").adapter == ""
    assert [card.name for card in models.cards()] == ["demo", "demo:x"]
    with pytest.raises(UnknownModelError, match=r"served: demo, demo:x, chat, demo:y$"):
        models.get("chat:z")


def test_an_adapter_that_is_not_announced_any_more_is_known_for_a_while() -> None:
    now = [100.0]
    book = AdapterBook(lambda: now[0])
    book.announced("demo", served(("x", "F1"), ("y", "F2")))
    now[0] += 1000
    assert book.fingerprint("demo", "x") == "F1"
    book.announced("demo", served(("y", "F3")))
    now[0] += ABSENT_S - 1
    # Said again, that does not begin anew.
    book.announced("demo", served(("y", "F3")))
    assert (book.fingerprint("demo", "x"), book.fingerprint("demo", "y")) == ("F1", "F3")
    now[0] += 2
    assert book.fingerprint("demo", "x") == ""
    assert book.names("demo") == ["y"]
    book.announced("demo", served(("x", "F1"), ("x", "F4")))
    # Of two the one whose worker came last.
    assert book.fingerprint("demo", "x") == "F4"


@pytest.mark.parametrize(
    ("models", "may", "may_not"),
    [
        (["demo:x"], ["aka-demo:x", "demo:x"], ["aka-demo", "aka-demo:y"]),
        (["demo"], ["demo"], ["demo:x", "other"]),
        (["demo:x"], ["demo:x"], ["demo", "demo:y"]),
        (["demo:*"], ["demo:x", "demo:y"], ["demo", "other:x", "demo:x:y"]),
        (["demo", "demo:*"], ["demo", "demo:x"], ["other", "demo2:x"]),
        ([":*", "*"], [], ["demo", "demo:x", ":x", ""]),
        (["llama:8b:*"], ["llama:8b:x"], ["llama:8b", "llama:x"]),
        (None, ["demo", "demo:x", ""], []),
    ],
)
def test_a_key_is_for_adapters_only_if_it_says_so(models: list[str] | None, may: list[str], may_not: list[str]) -> None:
    names = ModelNames(["demo", "other"], {"aka-demo": "demo"})
    identity = Identity(
        "t", frozenset(Scope), None if models is None else frozenset(models), frozenset(), names, lambda reason: None
    )
    for name in may:
        identity.permit(inference_pb2.TokenizeRequest(model=name))
    for name in may_not:
        with pytest.raises(ForbiddenError):
            identity.permit(inference_pb2.TokenizeRequest(model=name))
    listed = inference_pb2.ListModelsResponse(models=[inference_pb2.Model(name=name) for name in (*may, *may_not)])
    assert [model.name for model in identity.shown(listed).models] == may  # type: ignore[attr-defined]


def test_prompts_of_two_adapters_have_no_hash_in_common() -> None:
    ids = list(range(256))
    salts = [prefix_salt(tenant, adapter) for tenant in ("", "t", "tF1") for adapter in ("", "F1", "F2")]
    assert len(set(salts)) == len(salts)
    hashes = [block_hashes(ids, salt) for salt in salts]
    assert len({each for of_one in hashes for each in of_one}) == sum(len(of_one) for of_one in hashes)
    assert (salts[0], salts[3]) == (b"", b"t")
