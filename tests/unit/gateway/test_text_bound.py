"""The bound on bytes per token: right wherever there is one, and none where text can vanish."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

from bucketserve_gateway.text_bound import bytes_per_token, bytes_per_token_of
from tests.unit.gateway.builders import byte_fallback_bpe, byte_level_bpe


def byte_level(normalizer=None, pre_tokenizer=None, added=()) -> Tokenizer:
    tokenizer = Tokenizer.from_str(byte_level_bpe().backend_tokenizer.to_str())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.add_tokens(list(added))
    return tokenizer


def split(behavior: str, invert: bool = False):
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\s+"), behavior, invert),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def of_unigram(byte_fallback: bool) -> Tokenizer:
    pieces = [("<unk>", 0.0), ("▁the", -1.0), ("▁", -2.0), ("t", -3.0), ("the" * 10, -3.0)]
    pieces += [(f"<0x{byte:02X}>", -9.0) for byte in range(256)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=byte_fallback))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return tokenizer


BOUNDED = {
    "byte level": byte_level(),
    "NFC": byte_level(normalizers.NFC()),
    "NFKC and lower case": byte_level(normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])),
    "shrinking replacement": byte_level(normalizers.Replace("thethe", "t")),
    "split and kept": byte_level(pre_tokenizer=split("isolated")),
    "long added token": byte_level(added=["<|a very long added token for nothing at all|>"]),
    "byte fallback": byte_fallback_bpe().backend_tokenizer,
    "unigram with bytes": of_unigram(True),
}
UNBOUNDED = {
    "words": Tokenizer(models.WordLevel({"the": 0, "[UNK]": 1}, unk_token="[UNK]")),
    "word pieces": Tokenizer(models.WordPiece({"the": 0, "[UNK]": 1}, unk_token="[UNK]")),
    "unigram, one token for all that is unknown": of_unigram(False),
    "unknown characters vanish": Tokenizer(models.BPE({"a": 0, "b": 1}, [])),
    "fused unknown characters": Tokenizer(models.BPE({"a": 0, "u": 1}, [], unk_token="u", fuse_unk=True)),
    "half a byte alphabet": Tokenizer.from_str(
        json.dumps(
            {
                **json.loads(byte_level().to_str()),
                "added_tokens": [],
                "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []},
            }
        )
    ),
    "stripped": byte_level(normalizers.Strip()),
    "accents taken off": byte_level(normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])),
    "runs of spaces are one": byte_level(normalizers.Replace(Regex(" {2,}"), " ")),
    "replaced by nothing": byte_level(normalizers.Replace("the", "")),
    "spaces between words are dropped": byte_level(pre_tokenizer=pre_tokenizers.WhitespaceSplit()),
    "what is split at is dropped": byte_level(pre_tokenizer=split("removed")),
    "an added token takes spaces beside it": byte_level(added=[AddedToken("<x>", lstrip=True)]),
}


@pytest.mark.parametrize("name", BOUNDED)
@settings(max_examples=60)
@given(
    st.lists(
        st.one_of(
            st.text(max_size=8),
            st.sampled_from(
                ["the", " ", "\n", "thethe", "<|a very long added token for nothing at all|>", "한", "K", "𝐊̧", "ᾢ"]
            ),
        ),
        min_size=1,
        max_size=40,
    ).map("".join)
)
def test_no_text_has_more_bytes_than_its_tokens_can_hold(name: str, text: str) -> None:
    tokenizer = BOUNDED[name]
    most = bytes_per_token(tokenizer)
    assert most is not None
    assert len(text.encode()) <= most * len(tokenizer.encode(text, add_special_tokens=False).ids)


@pytest.mark.parametrize("name", UNBOUNDED)
def test_there_is_no_bound_where_text_can_vanish(name: str) -> None:
    assert bytes_per_token(UNBOUNDED[name]) is None


def test_the_bound_is_the_longest_token() -> None:
    tokens = byte_level().get_vocab()
    assert bytes_per_token(byte_level()) == max(map(len, tokens))
    assert bytes_per_token(byte_level(normalizers.NFC())) == 4 * max(map(len, tokens))
    # Tokenizers that are not built on the library say nothing of themselves.
    assert bytes_per_token(object()) is None


def test_what_is_not_known_has_no_bound() -> None:
    description = json.loads(byte_level().to_str())
    for step in ("normalizer", "pre_tokenizer"):
        assert bytes_per_token_of({**description, step: {"type": "Invented"}}) is None
