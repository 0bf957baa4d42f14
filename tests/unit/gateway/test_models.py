"""What the gateway reads of a model's directory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bucketserve.core.errors import ModelLoadError
from bucketserve_gateway.models import load_models
from bucketserve_gateway.tokenization import encode
from tests.unit.gateway.builders import byte_level_bpe


@pytest.mark.parametrize(
    ("config_eos", "generation_eos", "expected"),
    [(7, None, (0, 7)), (7, [9, 8], (0, 8, 9)), (None, None, (0,)), (0, 0, (0,))],
)
def test_the_tokenizers_own_end_token_ends_generation_too(
    tmp_path: Path, config_eos: int | None, generation_eos: list[int] | int | None, expected: tuple[int, ...]
) -> None:
    byte_level_bpe().save_pretrained(tmp_path)
    config = {"model_type": "gpt2", "vocab_size": 400, "n_positions": 64, "eos_token_id": config_eos}
    (tmp_path / "config.json").write_text(json.dumps(config))
    if generation_eos is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": generation_eos}))
    assert load_models({"m": str(tmp_path)}, 16).get("m").card.eos_token_ids == expected


def test_a_tokenizer_that_can_not_be_streamed_is_refused(tmp_path: Path) -> None:
    tokenizer = byte_level_bpe()
    tokenizer.save_pretrained(tmp_path)
    description = json.loads((tmp_path / "tokenizer.json").read_text())
    strip = {"type": "Strip", "content": " ", "start": 0, "stop": 1}
    description["decoder"] = {"type": "Sequence", "decoders": [description["decoder"], strip]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(description))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "vocab_size": 400, "n_positions": 64}))
    with pytest.raises(ModelLoadError, match=r"model 'm' from .*: .*token by token: ByteLevel, Strip at the end"):
        load_models({"m": str(tmp_path)}, 16)


def test_a_prompt_is_neither_cut_nor_padded_as_a_tokenizer_was_in_training(tmp_path: Path) -> None:
    tokenizer = byte_level_bpe()
    tokenizer.backend_tokenizer.enable_truncation(max_length=8)
    tokenizer.backend_tokenizer.enable_padding(length=16)
    tokenizer.save_pretrained(tmp_path)
    description = json.loads((tmp_path / "tokenizer.json").read_text())
    assert description["truncation"]
    assert description["padding"]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "vocab_size": 400, "n_positions": 64}))
    served = load_models({"m": str(tmp_path)}, 16).get("m")
    for text in ("a", "the quick brown fox jumps over the lazy dog"):
        assert encode(served, text) == byte_level_bpe()(text)["input_ids"]
