from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders

from bucketserve.core.errors import ModelLoadError
from bucketserve_gateway.detokenizer import Detokenizer, StopMatcher, TokenBytes, byte_alphabet
from tests.unit.gateway.builders import (
    CORPUS,
    byte_fallback_bpe,
    byte_fallback_without_strip,
    byte_level_bpe,
    metaspace_unigram,
    suffix_bpe,
    without_decoder,
    word_piece,
)

BUILDERS = (
    byte_level_bpe,
    byte_fallback_bpe,
    byte_fallback_without_strip,
    word_piece,
    metaspace_unigram,
    suffix_bpe,
    without_decoder,
)
SHOWN = ("<tool>", "日本", " <x> ")
"""Added tokens that are not special: part of the text."""


def _tokenizers() -> dict[str, Tokenizer]:
    found = {}
    for build in BUILDERS:
        backend = build().backend_tokenizer
        backend.add_tokens([AddedToken(content, special=False, normalized=False) for content in SHOWN])
        backend.add_special_tokens([AddedToken("<|user|>", special=True)])
        found[build.__name__] = backend
    return found


TOKENIZERS = _tokenizers()
TOKEN_BYTES = {name: TokenBytes(tokenizer) for name, tokenizer in TOKENIZERS.items()}
FALLBACK = ("byte_fallback_bpe", "byte_fallback_without_strip")
FRAGMENTS = (
    *CORPUS,
    "😀",
    "👩‍👩‍👧‍👦🇩🇪🇫🇷👍🏽",
    "é̂ñ ",
    "漢字かな한국어",
    " ",
    "  ",
    "\n\n ",
    " leading and trailing ",
    "don't stop, it's here.",
    *SHOWN,
)


def continuation(name: str, prompt: list[int], output: list[int]) -> str:
    """Returns the reference: what decoding everything at once adds to the decoded prompt."""
    decode = TOKENIZERS[name].decode
    whole, head = decode(prompt + output), decode(prompt)
    # Where the output completes a character of which the prompt has a part, that part is left out of the prompt.
    if name in FALLBACK:
        head = next(head for end in range(len(prompt), -1, -1) if whole.startswith(head := decode(prompt[:end])))
    elif not whole.startswith(head):
        head = head.removesuffix("\ufffd")
    assert whole.startswith(head)
    return whole[len(head) :]


def streamed(name: str, prompt: list[int], deliveries: list[list[int]]) -> str:
    detokenizer = Detokenizer(TOKEN_BYTES[name], prompt)
    pieces = [detokenizer.put(delivery) for delivery in deliveries]
    return "".join([*pieces, detokenizer.put((), is_last=True)])


def all_splits(items: list[int]) -> Iterator[list[list[int]]]:
    for cuts in itertools.product((False, True), repeat=max(len(items) - 1, 0)):
        starts = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), len(items)]
        yield [items[low:high] for low, high in itertools.pairwise(starts)]


def random_split(items: list[int], rng: random.Random) -> list[list[int]]:
    deliveries = []
    while items:
        size = rng.choice([1, 1, 2, 3, 7, 17, 40])
        deliveries.append(items[:size])
        items = items[size:]
    return deliveries


@st.composite
def sequences(draw: st.DrawFn, name: str) -> list[int]:
    """Tokens of texts, any tokens at all, special ones and such as the tokenizer does not know."""
    tokenizer = TOKENIZERS[name]
    size = tokenizer.get_vocab_size()
    text = st.one_of(st.sampled_from(FRAGMENTS), st.text(max_size=8))
    part = st.one_of(
        text.map(lambda drawn: tokenizer.encode(drawn, add_special_tokens=False).ids),
        st.lists(st.integers(0, size + 3), max_size=4),
    )
    return [token_id for ids in draw(st.lists(part, max_size=6)) for token_id in ids]


@pytest.mark.parametrize("name", TOKENIZERS)
@given(data=st.data())
@settings(max_examples=80)
def test_the_text_continues_the_prompt_however_it_is_delivered(name: str, data: st.DataObject) -> None:
    tokenizer, ids = TOKENIZERS[name], data.draw(sequences(name))
    cut = data.draw(st.integers(0, len(ids)))
    prompt, output = ids[:cut], ids[cut:]
    text = streamed(name, prompt, [output])
    splits = all_splits(output) if len(output) <= 7 else (random_split(output, random.Random(i)) for i in range(8))
    for deliveries in splits:
        assert streamed(name, prompt, deliveries) == text
    if name in FALLBACK and "\ufffd" in tokenizer.decode(ids):
        # One ill-formed byte makes the library replace whole characters beside it: here they stay.
        kept = iter(text)
        assert all(character in kept for character in tokenizer.decode(output) if character not in "\ufffd ")
    else:
        assert text == continuation(name, prompt, output)


@pytest.mark.parametrize("name", ["byte_level_bpe", *FALLBACK])
@pytest.mark.parametrize("text", ["😀" * 25, "👩‍👩‍👧‍👦" * 9, "漢字" * 30, "🇩🇪 " * 20, "é̂" * 30])
def test_long_deliveries_break_no_character(name: str, text: str) -> None:
    ids = TOKENIZERS[name].encode("x " + text, add_special_tokens=False).ids
    for size in (1, 3, 16, 17, 18, 19, 33, len(ids)):
        detokenizer = Detokenizer(TOKEN_BYTES[name])
        pieces = [detokenizer.put(ids[i : i + size]) for i in range(0, len(ids), size)]
        assert "".join(pieces) == "x " + text
        assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("name", ["byte_level_bpe", *FALLBACK])
def test_a_character_that_the_prompt_begins_is_shown_whole_in_the_output(name: str) -> None:
    # Trained vocabularies have tokens of several bytes: take one byte a token.
    tokenizer = TOKENIZERS[name]
    letter = tokenizer.encode("a", add_special_tokens=False).ids[-1]
    first, second, third, fourth = _byte_ids(tokenizer, "😀".encode())
    for deliveries in all_splits([third, fourth, letter]):
        assert streamed(name, [letter, first, second], deliveries) == "😀a"
    # What the output does not complete is the prompt's, and not shown.
    for deliveries in all_splits([letter, letter]):
        assert streamed(name, [letter, first, second], deliveries) == "aa"
    assert streamed(name, [letter, first], [[]]) == ""


@pytest.mark.parametrize("name", ["byte_level_bpe", *FALLBACK])
def test_invalid_bytes_cost_no_character_beside_them(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    letter = tokenizer.encode("a", add_special_tokens=False).ids[-1]
    emoji = _byte_ids(tokenizer, "😀".encode())
    invalid = _byte_ids(tokenizer, b"\xff")
    at_end = "\ufffd" if name == "byte_level_bpe" else "\ufffd" * 3
    for output, text in (
        (emoji + invalid + emoji, "😀\ufffd😀"),
        (emoji + emoji + emoji[:3], f"😀😀{at_end}"),
        ([letter, *emoji[:3]], f"a{at_end}"),
        (invalid * 40 + [letter], "\ufffd" * 40 + "a"),
    ):
        for seed in range(8):
            assert streamed(name, [letter], random_split(output, random.Random(seed))) == text


def _byte_ids(tokenizer: Tokenizer, data: bytes) -> list[int]:
    as_fallback = [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in data]
    if None not in as_fallback:
        return as_fallback
    characters = {byte: character for character, byte in byte_alphabet().items()}
    return [tokenizer.token_to_id(characters[byte]) for byte in data]


def test_a_decoder_that_needs_the_whole_text_is_refused() -> None:
    tokenizer = byte_level_bpe().backend_tokenizer
    for decoder in (
        decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)]),
        decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 0, 1)]),
    ):
        tokenizer.decoder = decoder
        with pytest.raises(ModelLoadError, match="token by token"):
            TokenBytes(tokenizer)


@pytest.mark.parametrize(
    ("stops", "text", "sent", "matched"),
    [
        (["END"], "abcENDdef", "abc", "END"),
        (["END"], "ENDabc", "", "END"),
        (["END"], "abcEN", "abcEN", ""),
        (["aab"], "aaab", "a", "aab"),
        (["\n\n", "\n"], "x\n\ny", "x", "\n"),
        (["long stop string", "top"], "a stop", "a s", "top"),
        (["bc", "abcd"], "abcd", "a", "bc"),
        (["bcd", "abcd", "d"], "xabcd", "x", "abcd"),
        (["abab"], "abaabab", "aba", "abab"),
        (["😀!"], "a😀😀!", "a😀", "😀!"),
        ([], "anything", "anything", ""),
    ],
)
def test_stop_strings_whatever_the_pieces(stops: list[str], text: str, sent: str, matched: str) -> None:
    for size in range(1, len(text) + 1):
        matcher, out, found = StopMatcher(stops), "", ""
        for start in range(0, len(text), size):
            piece = matcher.put(text[start : start + size])
            out, found = out + piece.text, piece.matched_stop
            if found:
                break
        else:
            piece = matcher.put("", is_last=True)
            out, found = out + piece.text, piece.matched_stop
        assert (out, found) == (sent, matched)


@given(
    st.text("ab", max_size=30),
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
    st.integers(0, 100),
)
@settings(max_examples=300)
def test_no_stop_string_is_ever_sent_and_nothing_else_is_kept(text: str, stops: list[str], seed: int) -> None:
    # The reference: the first end of a stop string, and the longest that ends there.
    ends = [(text.find(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
    expected = text if not ends else text[: min(ends)[0] + min(ends)[1]]
    matcher, out, rng, rest = StopMatcher(stops), "", random.Random(seed), text
    while rest:
        size = rng.randint(1, 5)
        piece = matcher.put(rest[:size])
        rest, out = rest[size:], out + piece.text
        # Only what may still become a stop string is held back.
        if piece.matched_stop:
            assert piece.matched_stop == min(ends)[2]
            break
        held = text[len(out) : len(text) - len(rest)]
        assert not held or any(stop.startswith(held) for stop in stops)
    else:
        out += matcher.put("", is_last=True).text
    assert out == expected
