from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bucketserve_gateway.detokenizer import Detokenizer, StopMatcher
from tests.unit.gateway.builders import CORPUS, byte_fallback_bpe, byte_level_bpe

TOKENIZERS = {"byte_level": byte_level_bpe(), "byte_fallback": byte_fallback_bpe()}


def decoder(name: str):
    return lambda ids: TOKENIZERS[name].decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def chunked(items: list[int], seed: int) -> list[list[int]]:
    rng, chunks = random.Random(seed), []
    while items:
        size = rng.choice([1, 1, 2, 3, 7])
        chunks.append(items[:size])
        items = items[size:]
    return chunks


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=st.one_of(st.sampled_from(CORPUS), st.text(max_size=60)), seed=st.integers(0, 1000))
@settings(max_examples=150, deadline=None)
def test_pieces_are_whole_characters_and_add_up(name: str, text: str, seed: int) -> None:
    decode = decoder(name)
    ids = TOKENIZERS[name](text, add_special_tokens=False)["input_ids"]
    detokenizer = Detokenizer(decode)
    pieces = [detokenizer.put(chunk) for chunk in chunked(ids, seed)]
    if "\ufffd" not in decode(ids):
        assert not any("\ufffd" in piece for piece in pieces)
    assert "".join([*pieces, detokenizer.put((), is_last=True)]) == decode(ids)


@given(ids=st.lists(st.integers(1, 399), max_size=40), seed=st.integers(0, 1000))
@settings(max_examples=200, deadline=None)
def test_random_tokens_lose_no_text(ids: list[int], seed: int) -> None:
    # Random tokens are full of broken characters: what is sent must still contain every whole one, in order.
    decode = decoder("byte_level")
    detokenizer = Detokenizer(decode)
    sent = "".join([*(detokenizer.put(chunk) for chunk in chunked(ids, seed)), detokenizer.put((), is_last=True)])
    assert sent.replace("\ufffd", "") == decode(ids).replace("\ufffd", "")


def test_the_prompt_decides_about_the_leading_space() -> None:
    decode = decoder("byte_fallback")
    prompt = TOKENIZERS["byte_fallback"]("hear", add_special_tokens=False)["input_ids"]
    word = TOKENIZERS["byte_fallback"]("the", add_special_tokens=False)["input_ids"]
    assert Detokenizer(decode, prompt).put(word) == " the"
    assert Detokenizer(decode).put(word) == "the"


def test_a_character_over_several_tokens_waits_for_its_last_byte() -> None:
    decode = decoder("byte_fallback")
    ids = TOKENIZERS["byte_fallback"]("😀", add_special_tokens=False)["input_ids"]
    detokenizer = Detokenizer(decode, [10])
    pieces = [detokenizer.put([token_id]) for token_id in ids]
    assert pieces[-1].endswith("😀")
    assert not "".join(pieces[:-1]).strip()


@pytest.mark.parametrize(
    ("stops", "text", "sent", "matched"),
    [
        (["END"], "abcENDdef", "abc", "END"),
        (["END"], "abcEN", "abcEN", ""),
        (["aab"], "aaab", "a", "aab"),
        (["\n\n", "\n"], "x\n\ny", "x", "\n\n"),
        (["long stop string", "top"], "a stop", "a s", "top"),
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
        # A shorter stop string that begins where a longer one does may match first when text comes bit by bit.
        assert out == sent
        assert found == matched or (matched.startswith(found) and found)


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3))
@settings(max_examples=300, deadline=None)
def test_no_stop_string_is_ever_sent(text: str, stops: list[str]) -> None:
    matcher, out = StopMatcher(stops), ""
    for character in text:
        piece = matcher.put(character)
        out += piece.text
        if piece.matched_stop:
            break
    else:
        out += matcher.put("", is_last=True).text
        assert out == text
    assert not any(stop in out for stop in stops)
    assert text.startswith(out)
