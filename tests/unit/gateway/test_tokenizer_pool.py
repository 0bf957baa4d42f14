"""Tokenising: bounded by the context, never wrongly refused, and nobody behind a long text but long ones."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from bucketserve.core.errors import InvalidRequestError, OverloadedError
from bucketserve.engine.grammars import GrammarTokenizer
from bucketserve.ports import StructuredOutput
from bucketserve.v1 import common_pb2
from bucketserve_gateway import tokenizer_pool
from bucketserve_gateway.models import ServedModel
from bucketserve_gateway.tokenization import Turn
from bucketserve_gateway.tokenizer_pool import TokenizerPool
from tests.unit.gateway.builders import catalog

SERVED = catalog(context_tokens=2000).get("")


class Watched:
    """A tokenizer that keeps the sizes of what it is given and, when told, does not come back from long texts."""

    def __init__(self, inner) -> None:
        self.inner = inner
        self.sizes: list[int] = []
        self.may_end = threading.Event()
        self.may_end.set()

    @property
    def backend_tokenizer(self) -> Watched:
        return self

    def encode_batch_fast(self, texts: list[str], **options):
        [text] = texts
        self.sizes.append(len(text))
        if len(text) > tokenizer_pool.LONG_CHARACTERS:
            assert self.may_end.wait(30)
        return self.inner.backend_tokenizer.encode_batch_fast(texts, **options)

    def apply_chat_template(self, messages, **options) -> str:
        if len(messages) > tokenizer_pool.LONG_MESSAGES:
            assert self.may_end.wait(30)
        return "".join(f"{turn['role']}: {turn['content'].strip()}\n" for turn in messages)


def served(inner=None) -> tuple[ServedModel, Watched]:
    tokenizer = Watched(inner or SERVED.tokenizer)
    return replace(SERVED, tokenizer=tokenizer), tokenizer


def words() -> PreTrainedTokenizerFast:
    """Drops whitespace, and makes one token of any unknown word: a long text may be a short prompt."""
    tokenizer = Tokenizer(models.WordPiece({"the": 0, "[UNK]": 1}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


GRAMMARS = GrammarTokenizer(SERVED.tokenizer.backend_tokenizer, SERVED.card.vocab_size)
Wanted = common_pb2.StructuredOutput


async def test_what_an_output_must_be_is_compiled_or_refused_by_name(pool: TokenizerPool) -> None:
    model = replace(SERVED, grammars=GRAMMARS)
    for wanted in (Wanted(), Wanted(json_schema="{}"), Wanted(choices=common_pb2.Choices(texts=["a"]))):
        await pool.check_structure(model, wanted)
    for wanted, field in (
        (Wanted(json_schema='{"$ref": "#"}'), "structured_output.json_schema"),
        (Wanted(regex="("), "structured_output.regex"),
        (Wanted(grammar="x" * 60_000), "structured_output.grammar"),
    ):
        with pytest.raises(InvalidRequestError) as caught:
            await pool.check_structure(model, wanted)
        assert [violation.field for violation in caught.value.violations] == [field]


class Slow:
    """Compiles when told."""

    def __init__(self) -> None:
        self.may_end = threading.Event()

    def check(self, structure) -> None:
        assert self.may_end.wait(30)


async def test_no_prompt_waits_for_a_schema_and_not_too_many_schemas_wait(pool: TokenizerPool) -> None:
    slow = Slow()
    model = replace(SERVED, grammars=slow)
    wanted = Wanted(json_schema="x" * 65_536)
    most = tokenizer_pool.MAX_WAITING_CHARACTERS // (65_536 * tokenizer_pool.STRUCTURE_WEIGHT)
    waiting = [asyncio.create_task(pool.check_structure(model, wanted)) for _ in range(most)]
    await asyncio.sleep(0)
    with pytest.raises(OverloadedError):
        await pool.check_structure(model, wanted)
    assert await pool.encode(model, "the word")
    slow.may_end.set()
    await asyncio.gather(*waiting)
    await pool.check_structure(model, wanted)


@pytest.fixture
def pool():
    pool = TokenizerPool(2, 8 << 20, lambda reason, message: OverloadedError(message, reason=reason, retry_delay_s=1.0))
    yield pool
    pool.close()


async def test_a_text_that_cannot_fit_is_not_tokenised_whole(pool: TokenizerPool) -> None:
    model, tokenizer = served()
    with pytest.raises(InvalidRequestError, match="context holds 2000"):
        await pool.encode(model, "the quick brown fox " * 200_000)
    assert 0 < sum(tokenizer.sizes) <= tokenizer_pool.PIECE_CHARACTERS


@pytest.mark.parametrize(
    "text",
    ["the" + " " * 500_000 + "the", "x" * 300_000, "the " * 1999, ("y" * 150 + " ") * 1999, " \n" * 200_000],
)
async def test_a_text_that_fits_is_tokenised_however_long_it_is(pool: TokenizerPool, text: str) -> None:
    model, tokenizer = served(words())
    ids = await pool.encode(model, text)
    assert ids == tokenizer.inner(text)["input_ids"]
    assert len(ids) < 2000


async def test_a_short_text_does_not_wait_for_long_ones(pool: TokenizerPool) -> None:
    model, tokenizer = served()
    tokenizer.may_end.clear()
    long = "a" * (tokenizer_pool.LONG_CHARACTERS + 1)
    waiting = [asyncio.create_task(pool.encode(model, long)) for _ in range(20)]
    many = [Turn("user", "hello")] * (tokenizer_pool.LONG_MESSAGES + 1)
    waiting.append(asyncio.create_task(pool.encode_chat(model, many)))
    await asyncio.sleep(0.05)
    for _ in range(50):
        assert await pool.encode(model, "the fox")
        assert await pool.encode_chat(model, [Turn("user", "hello")])
    assert not any(task.done() for task in waiting)
    tokenizer.may_end.set()
    await asyncio.gather(*waiting, return_exceptions=True)


async def test_no_text_waits_for_what_is_compiled(pool: TokenizerPool) -> None:
    may_end = threading.Event()

    class Slow(GrammarTokenizer):
        def check(self, wanted: StructuredOutput) -> None:
            assert may_end.wait(30)

    slow = replace(SERVED, grammars=Slow(SERVED.tokenizer.backend_tokenizer, SERVED.card.vocab_size))
    waiting = [asyncio.create_task(pool.check_structure(slow, Wanted(regex="a" * size))) for size in (1, 60_000) * 9]
    await asyncio.sleep(0.05)
    model, _ = served()
    async with asyncio.timeout(20):
        assert await pool.encode(model, "the fox")
        with pytest.raises(InvalidRequestError):
            await pool.encode(model, "the fox " * 20_000)
    assert not any(task.done() for task in waiting)
    may_end.set()
    await asyncio.gather(*waiting)


async def test_what_waits_to_be_tokenised_is_bounded(pool: TokenizerPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_pool, "MAX_WAITING_CHARACTERS", 100_000)
    model, tokenizer = served()
    tokenizer.may_end.clear()
    # The first one is alone, and let in whatever its size.
    first = asyncio.create_task(pool.encode(model, "the fox " * 20_000))
    await asyncio.sleep(0.05)
    with pytest.raises(OverloadedError) as caught:
        await pool.encode(model, "the fox " * 20_000)
    assert caught.value.reason == "TOKENIZER_BUSY"
    # Giving up makes no room: the thread goes on.
    first.cancel()
    await asyncio.sleep(0)
    with pytest.raises(OverloadedError):
        await pool.encode(model, "the fox " * 20_000)
    tokenizer.may_end.set()
    for _ in range(100):
        try:
            await pool.encode(model, "the " * 5000)
        except OverloadedError:
            await asyncio.sleep(0.05)
        except InvalidRequestError:
            break
    else:
        raise AssertionError("no room was made")


async def test_a_conversation_is_bounded_as_its_template_renders_it(pool: TokenizerPool) -> None:
    model, tokenizer = served()
    # The template trims: what is left of a megabyte is short.
    assert len(await pool.encode_chat(model, [Turn("user", "hi" + " " * 1_000_000)])) < 20
    with pytest.raises(InvalidRequestError, match="chat"):
        await pool.encode_chat(model, [Turn("user", "the fox " * 400_000)])
    assert max(tokenizer.sizes) <= tokenizer_pool.PIECE_CHARACTERS
