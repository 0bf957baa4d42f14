"""How many bytes of text a token stands for at most, read from a tokenizer's own description.

With it a text that can't fit a context is refused before anything of it is tokenised. Only what is proven is used:
each step between text and tokens must keep every byte or shrink the text by a known factor at most. Tokenizers that
drop text (unknown words, whitespace between words, control characters) have no bound: a long text may be a short
prompt.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

__all__ = ["bytes_per_token", "bytes_per_token_of"]

Part = Mapping[str, Any]

KEEPS = 1.0
NORMALIZERS = {
    # The longest sequence for one character, singletons included: Hangul (9 bytes to 3), Kelvin sign (3 to 1),
    # mathematical letters and digits (4 to 1).
    "NFC": 4.0,
    "NFD": 4.0,
    "NFKC": 4.0,
    "NFKD": 4.0,
    "Lowercase": 3.0,
    "Prepend": KEEPS,
    "ByteLevel": KEEPS,
}
PRE_TOKENIZERS = ("ByteLevel", "Metaspace", "Digits", "UnicodeScripts")
SPLITTERS = ("Split", "Punctuation")
"""Keep all text unless their behavior is Removed."""


def bytes_per_token(tokenizer: Any) -> float | None:
    """Returns the most bytes of text that a token of a tokenizer can stand for; None if there is no such number.

    Args:
        tokenizer: a tokenizers.Tokenizer, or one of transformers that is built on it.
    """
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    return bytes_per_token_of(json.loads(backend.to_str())) if hasattr(backend, "to_str") else None


def bytes_per_token_of(description: Part) -> float | None:
    """The same from the content of a tokenizer.json."""
    added = description.get("added_tokens") or ()
    if any(token["lstrip"] or token["rstrip"] for token in added):
        # They take the whitespace beside them, however much there is.
        return None
    shrink = _of_all(_parts(description.get("normalizer"), "normalizers"), _normalizer)
    splits = _of_all(_parts(description.get("pre_tokenizer"), "pretokenizers"), _pre_tokenizer)
    longest = _longest_token(description)
    if shrink is None or splits is None or longest is None:
        return None
    # An added token's own text may be matched after normalising, too.
    longest = max(longest, *(len(token["content"].encode()) for token in added), 1)
    return shrink * longest


def _longest_token(description: Part) -> float | None:
    """Returns the bytes of the longest token; None if unknown text is not one token for each character or byte."""
    model = description["model"]
    if model.get("type") not in ("BPE", "Unigram"):
        return None
    vocabulary = model["vocab"]
    tokens = list(vocabulary) if isinstance(vocabulary, dict) else [piece for piece, _ in vocabulary]
    if not tokens:
        return None
    found = set(tokens)
    if _is_byte_level(description):
        # A byte is a character here; those that the vocabulary lacks are lost.
        alphabet = set(_byte_alphabet())
        return max(map(len, tokens)) if alphabet <= found else None
    has_bytes = model.get("byte_fallback") and all(f"<0x{byte:02X}>" in found for byte in range(256))
    # Unigram always makes one token of a run of unknown characters.
    has_unknown = model["type"] == "BPE" and model.get("unk_token") in found and not model.get("fuse_unk")
    # A character that is unknown has four bytes at most.
    longest = max(len(token.encode()) for token in tokens)
    return max(longest, 4) if has_bytes or has_unknown else None


def _is_byte_level(description: Part) -> bool:
    parts = _parts(description.get("pre_tokenizer"), "pretokenizers")
    parts += _parts(description.get("normalizer"), "normalizers")
    return any(part["type"] == "ByteLevel" for part in parts)


def _byte_alphabet() -> list[str]:
    """Returns the character that stands for each byte in byte-level vocabularies."""
    from tokenizers.pre_tokenizers import ByteLevel

    return list(ByteLevel.alphabet())


def _parts(part: Part | None, name: str) -> list[Part]:
    """Returns a step's parts, sequences unrolled."""
    if part is None:
        return []
    if part["type"] == "Sequence":
        return [inner for each in part[name] for inner in _parts(each, name)]
    return [part]


def _of_all(parts: list[Part], factor: Any) -> float | None:
    """Returns the product of the factors of all parts; None if one has none."""
    product = KEEPS
    for part in parts:
        own = factor(part)
        if own is None:
            return None
        product *= own
    return product


def _normalizer(part: Part) -> float | None:
    if part["type"] == "Replace":
        old, new = part["pattern"].get("String"), part["content"]
        return max(len(old.encode()) / len(new.encode()), KEEPS) if old and new else None
    return NORMALIZERS.get(part["type"])


def _pre_tokenizer(part: Part) -> float | None:
    if part["type"] in PRE_TOKENIZERS:
        return KEEPS
    return KEEPS if part["type"] in SPLITTERS and part.get("behavior") != "Removed" else None
