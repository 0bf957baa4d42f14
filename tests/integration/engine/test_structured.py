"""Constrained output of the demo model, at random and greedy: it fits, whatever interrupts it and runs beside it."""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from tokenizers import Tokenizer

from bucketserve.core.errors import EngineError
from bucketserve.core.types import FinishReason, RequestId
from bucketserve.engine.fake import FakeEngine
from bucketserve.engine.grammars import GrammarError, GrammarTokenizer
from bucketserve.engine.loader import LoadSettings, load_engine
from bucketserve.engine.packed import PackedEngine
from bucketserve.ports import Sampling, SequenceFailure, SequenceSpec, StructuredOutput, StructureKind
from tests.integration.engine.models import engine as small_engine
from tests.integration.engine.test_equality import one_thread  # noqa: F401

pytestmark = pytest.mark.engine
MODEL = Path(__file__).resolve().parents[3] / "models" / "demo" / "model"
TOKENIZER = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
STOP = frozenset({TOKENIZER.token_to_id("<|endoftext|>")})
NUM_SCHEMAS = 1000
PROMPT = tuple(TOKENIZER.encode("And the king said", add_special_tokens=False).ids)


@cache
def engine(number: int = 0) -> PackedEngine:
    """One of two that are alike."""
    return load_engine(LoadSettings(model=str(MODEL), kv_budget_tokens=40_000, max_step_tokens=512))


def spec(name: str, wanted: StructuredOutput | None, max_tokens: int = 120, **more: Any) -> SequenceSpec:
    more.setdefault("token_ids", PROMPT)
    sampling = more.pop("sampling", Sampling(temperature=0.7, seed=len(name)))
    return SequenceSpec(
        request_id=RequestId(name),
        max_new_tokens=max_tokens,
        sampling=sampling,
        structured_output=wanted,
        stop_token_ids=STOP,
        **more,
    )


def schema(value: object) -> StructuredOutput:
    return StructuredOutput(StructureKind.JSON_SCHEMA, json.dumps(value))


class Run:
    """Tokens and ends of what an engine runs."""

    def __init__(self, under_test: PackedEngine) -> None:
        self.engine = under_test
        self.tokens: dict[str, list[int]] = {}
        self.reasons: dict[str, FinishReason] = {}
        self.failures: list[SequenceFailure] = []

    def step(self) -> None:
        output = self.engine.step()
        self.failures += output.failures
        for token in output.tokens:
            if token.token_id is not None:
                self.tokens.setdefault(token.request_id, []).append(token.token_id)
            if token.finish_reason is not None:
                self.reasons[token.request_id] = token.finish_reason

    def all(self, *specs: SequenceSpec) -> Run:
        self.engine.add(specs)
        while self.engine.has_work():
            self.step()
        return self

    def text(self, name: str) -> str:
        return TOKENIZER.decode(self.tokens[name])


def random_schema(rng: random.Random, depth: int = 0) -> dict[str, Any]:  # noqa: PLR0912
    """A schema out of everything that is served."""
    kinds = ["string", "integer", "number", "boolean", "null", "enum", "const", "pattern", "format", "any"]
    kind = rng.choice(kinds if depth > 2 else [*kinds, *["object", "array", "tuple", "anyOf", "allOf", "ref"] * 2])
    match kind:
        case "enum":
            return {"enum": rng.sample(["a", 'b"\\', "é😀", 0, -1.5, None, True, [1], {"x": "y"}], rng.randint(1, 5))}
        case "const":
            return {"const": rng.choice(["a\n", 7, None, {"k": [1, {"l": False}]}])}
        case "pattern":
            return {"type": "string", "pattern": rng.choice(["^[a-z]{1,4}$", "^x[0-9]+y?$", "ab", "^(a|bc)*$"])}
        case "format":
            return {"type": "string", "format": rng.choice(["date", "time", "date-time", "uuid", "ipv4"])}
        case "any":
            return {}
        case "string":
            low = rng.randint(0, 3)
            return {"type": "string", "minLength": low, "maxLength": low + rng.randint(0, 12)}
        case "integer" | "number":
            low = rng.randint(-1000, 1000)
            bounds = {"minimum": low, "maximum": low + rng.randint(0, 5000)}
            more = {"multipleOf": rng.choice([1, 2, 5])} if kind == "integer" and rng.random() < 0.2 else {}
            return {"type": kind, **(bounds if rng.random() < 0.7 else {}), **more}
        case "object":
            names = rng.sample(["a", "b c", "é", 'q"', "long_name", "z"], rng.randint(0, 4))
            properties = {name: random_schema(rng, depth + 1) for name in names}
            required = [name for name in names if rng.random() < 0.6]
            more = rng.choice([{"additionalProperties": False}, {}, {"additionalProperties": {"type": "integer"}}])
            return {"type": "object", "properties": properties, "required": required, **more}
        case "array":
            low = rng.randint(0, 2)
            return {
                "type": "array",
                "items": random_schema(rng, depth + 1),
                "minItems": low,
                "maxItems": low + rng.randint(0, 3),
            }
        case "tuple":
            items = [random_schema(rng, depth + 1) for _ in range(rng.randint(1, 3))]
            return {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}
        case "anyOf":
            return {"anyOf": [random_schema(rng, depth + 1) for _ in range(rng.randint(1, 3))]}
        case "allOf":
            return {
                "allOf": [{"type": "object", "properties": {"a": random_schema(rng, depth + 1)}}, {"required": ["a"]}]
            }
        case "ref":
            list_of = {"type": "object", "properties": {"next": {"$ref": "#/$defs/n"}, "v": {"type": "boolean"}}}
            return {"$ref": "#/$defs/n", "$defs": {"n": list_of}} if depth == 0 else {"type": "boolean"}
        case _:
            return {"type": kind}


@pytest.mark.timeout(900)
def test_random_schemas_are_kept_to() -> None:
    """What ends by itself is valid; what is cut says so and is a beginning of what is valid."""
    rng = random.Random(11)
    grammars = GrammarTokenizer(TOKENIZER, 4096)
    schemas: dict[str, tuple[object, StructuredOutput]] = {}
    num_refused = 0
    while len(schemas) < NUM_SCHEMAS:
        value = random_schema(rng)
        jsonschema.Draft202012Validator.check_schema(value)
        try:
            grammars.check(schema(value))
        except GrammarError:
            num_refused += 1
            continue
        schemas[f"r{len(schemas)}"] = value, schema(value)
    assert num_refused < NUM_SCHEMAS / 20
    run = Run(engine())
    names = list(schemas)
    for start in range(0, NUM_SCHEMAS, 100):
        run.all(
            *(
                spec(name, schemas[name][1], 100, sampling=Sampling(temperature=rng.choice([0, 1, 3]), seed=i))
                for i, name in enumerate(names[start : start + 100])
            )
        )
    assert not run.failures
    assert set(run.reasons) == set(names)
    validator = jsonschema.Draft202012Validator
    num_whole = 0
    for name, (value, wanted) in schemas.items():
        if run.reasons[name] is FinishReason.STOP:
            num_whole += 1
            validator(value, format_checker=validator.FORMAT_CHECKER).validate(json.loads(run.text(name)))
        else:
            assert (run.reasons[name], len(run.tokens[name])) == (FinishReason.LENGTH, 100)
            grammars.matcher(wanted, run.tokens[name])
    assert num_whole > NUM_SCHEMAS / 2
    engine().check_integrity()


PERSON = schema(
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 20},
            "age": {"type": "integer"},
            "tags": {"type": "array"},
        },
        "required": ["name", "age", "tags"],
    }
)
OTHERS = {
    "regex": StructuredOutput(StructureKind.REGEX, "(Noah|Moses|[A-Z][a-z]{2,9}) said: [a-z ]{5,60}[.]"),
    "choices": StructuredOutput(StructureKind.CHOICES, json.dumps(["the king of Israel", "the king of Judah", "no"])),
    "grammar": StructuredOutput(StructureKind.GRAMMAR, 'start: "(" start? ")" | /[a-z]{3,30}/'),
    "person": PERSON,
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0, presence_penalty=0.5, seed=5)], ids=str)
def test_an_output_goes_on_at_any_token_as_if_it_had_not_been_interrupted(name: str, sampling: Sampling) -> None:
    wanted = OTHERS[name]
    first, second = Run(engine()), Run(engine(1))
    first.all(spec("whole", wanted, 80, sampling=sampling), spec("beside", None, 30), spec("other", PERSON, 50))
    whole = first.tokens["whole"]
    cuts = [cut for cut in range(len(whole)) if cut % 5 == 0]
    second.all(
        *(
            spec(
                f"cut{cut}",
                wanted,
                80 - cut,
                token_ids=(*PROMPT, *whole[:cut]),
                num_resumed_tokens=cut,
                sampling=sampling,
            )
            for cut in cuts
        )
    )
    for cut in cuts:
        assert whole[:cut] + second.tokens[f"cut{cut}"] == whole
        assert second.reasons[f"cut{cut}"] is first.reasons["whole"]


@pytest.mark.parametrize("name", OTHERS)
def test_an_output_goes_on_in_the_engine_that_takes_its_kv(name: str) -> None:
    wanted = OTHERS[name]
    whole = Run(engine()).all(spec("handed", wanted))
    prefill, decode = Run(engine()), Run(engine(1))
    handed = spec("handed", wanted)
    prefill.engine.add([spec("handed", wanted, hands_over=True)])
    while "handed" not in prefill.tokens:
        prefill.step()
    kv = memoryview(bytearray(len(PROMPT) * engine().info.kv_bytes_per_token))
    prefill.engine.export_kv(RequestId("handed"), kv)
    decode.tokens["handed"] = list(prefill.tokens["handed"])
    decode.engine.import_kv(handed, prefill.tokens["handed"], kv)
    decode.all(spec("beside", None, 5))
    assert (decode.tokens["handed"], decode.reasons["handed"]) == (whole.tokens["handed"], whole.reasons["handed"])


def test_it_ends_where_nothing_may_follow_and_where_its_stop_token_may() -> None:
    run = Run(engine())
    run.all(
        spec("closed", StructuredOutput(StructureKind.REGEX, "abc"), sampling=Sampling()),
        # The end token is not allowed before three, and is what is left after five.
        spec("open", StructuredOutput(StructureKind.REGEX, "(a{3}){1,2}"), sampling=Sampling(logit_bias=((0, 100.0),))),
        spec("cut", StructuredOutput(StructureKind.REGEX, "[a-z]{400}"), 7),
        # A stop token of its own that is a part of what is asked for.
        SequenceSpec(
            request_id=RequestId("own"),
            token_ids=PROMPT,
            max_new_tokens=50,
            structured_output=StructuredOutput(StructureKind.REGEX, "a?b"),
            stop_token_ids=frozenset(TOKENIZER.encode("a", add_special_tokens=False).ids),
        ),
    )
    assert {name: run.text(name) for name in ("closed", "open", "own")} == {"closed": "abc", "open": "aaa", "own": "b"}
    assert {name: run.reasons[name] for name in ("closed", "open", "own")} == dict.fromkeys(
        ("closed", "open", "own"), FinishReason.STOP
    )
    assert (run.reasons["cut"], len(run.tokens["cut"])) == (FinishReason.LENGTH, 7)


def test_log_probabilities_are_the_model_s_own() -> None:
    under_test = engine()
    under_test.add([spec("a", StructuredOutput(StructureKind.CHOICES, '["zzz"]'), num_logprobs=2)])
    found = []
    while under_test.has_work():
        found += under_test.step().tokens
    # What it would have said is not what it had to say.
    assert all(token.logprobs is not None for token in found)
    assert any(token.logprobs.top[0].token_id != token.token_id for token in found)
    assert all(token.logprobs.top[0].logprob >= token.logprobs.chosen.logprob > -100 for token in found)


def test_what_cannot_be_followed_fails_alone() -> None:
    run = Run(engine())
    too_complex = schema({"properties": {f"p{i}": {} for i in range(2000)}, "type": "object"})
    biased = Sampling(logit_bias=tuple((i, 100.0) for i in TOKENIZER.encode('{"', add_special_tokens=False).ids))
    run.all(
        spec("no grammar", StructuredOutput(StructureKind.GRAMMAR, "x")),
        spec("no beginning", PERSON, token_ids=(*PROMPT, *PROMPT), num_resumed_tokens=len(PROMPT)),
        spec("complex", too_complex, sampling=biased),
        spec("fine", OTHERS["choices"]),
        spec("plain", None, 5),
    )
    assert {failure.request_id for failure in run.failures} == {"no grammar", "no beginning", "complex"}
    assert all(not failure.is_retryable and "constrained" in failure.message for failure in run.failures)
    assert set(run.reasons) == {"fine", "plain"}
    engine().check_integrity()


def test_what_is_cancelled_while_it_is_compiled_is_gone() -> None:
    under_test = engine()
    under_test.add([spec(f"r{i}", PERSON) for i in range(20)])
    under_test.cancel([RequestId(f"r{i}") for i in range(20)])
    assert not under_test.has_work()
    assert Run(under_test).all(spec("r1", OTHERS["choices"])).reasons == {"r1": FinishReason.STOP}


def test_engines_without_grammars_say_so_and_take_none() -> None:
    assert engine().info.has_grammars
    for under_test in (FakeEngine(), small_engine("llama")):
        assert not under_test.info.has_grammars
        with pytest.raises(EngineError, match="grammars"):
            under_test.add([spec("a", PERSON, token_ids=(5,))])
        assert not under_test.has_work()
