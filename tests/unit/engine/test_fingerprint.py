"""Fingerprints: the same for the same model however it is stored, another one for anything that computes otherwise."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from bucketserve.core.errors import ModelLoadError
from bucketserve.engine import fingerprint
from bucketserve.engine.fake import FakeEngine, FakeSettings
from bucketserve.engine.fingerprint import adapter_fingerprint, model_fingerprint, tokenizer_fingerprint

TENSORS = {"a.weight": 40, "b.weight": 300_000, "c.weight": 17}
CONFIG = {"model_type": "llama", "hidden_size": 64, "transformers_version": "5.0"}


def weights(sizes: dict[str, int], change: tuple[str, int] | None = None) -> bytes:
    """A safetensors file in which each tensor is bytes of its own; `change` names one to turn over."""
    header, data = {}, b""
    for name, size in sizes.items():
        content = bytearray((hash_of(name) + i) % 251 for i in range(size))
        if change is not None and change[0] == name:
            content[change[1]] ^= 1
        header[name] = {"dtype": "U8", "shape": [size], "data_offsets": [len(data), len(data) + size]}
        data += content
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    return len(text).to_bytes(8, "little") + text + data


def hash_of(name: str) -> int:
    return sum(name.encode())


def store(at: Path, files: dict[str, bytes], config: dict[str, object] = CONFIG) -> Path:
    at.mkdir()
    (at / "config.json").write_text(json.dumps(config))
    for name, content in files.items():
        (at / name).write_bytes(content)
    return at


def of(at: Path, **changes: str) -> str:
    return model_fingerprint(at, **{"engine": "transformers", "dtype": "float32", "quantization": "none", **changes})


@pytest.fixture(params=[True, False], ids=["whole", "sampled"])
def sizes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if not request.param:
        monkeypatch.setattr(fingerprint, "WHOLE_BYTES", 1000)
    return bool(request.param)


def test_it_does_not_depend_on_how_the_weights_are_stored(tmp_path: Path, sizes: bool) -> None:
    one = store(tmp_path / "one", {"model.safetensors": weights(TENSORS)})
    index = {"a.weight": "m1.safetensors", "b.weight": "m2.safetensors", "c.weight": "m1.safetensors"}
    several = store(
        tmp_path / "several",
        {
            "model.safetensors.index.json": json.dumps({"weight_map": index}).encode(),
            "m1.safetensors": weights({"c.weight": 17, "a.weight": 40}),
            "m2.safetensors": weights({"b.weight": 300_000}),
        },
        {**CONFIG, "transformers_version": "6.0", "_name_or_path": "/elsewhere"},
    )
    assert of(one) == of(several)
    assert len(of(one)) == 32


@pytest.mark.parametrize("change", [("a.weight", 39), ("b.weight", 0), ("b.weight", 299_999), ("c.weight", 3)])
def test_other_weights_of_the_same_shapes_have_another(tmp_path: Path, sizes: bool, change: tuple[str, int]) -> None:
    one = store(tmp_path / "one", {"model.safetensors": weights(TENSORS)})
    other = store(tmp_path / "other", {"model.safetensors": weights(TENSORS, change)})
    assert of(one) != of(other)


def test_up_to_the_limit_every_byte_counts(tmp_path: Path) -> None:
    one = store(tmp_path / "one", {"model.safetensors": weights(TENSORS)})
    seen = {of(one)}
    for at in (70_000, 123_457, 200_001):
        seen.add(of(store(tmp_path / str(at), {"model.safetensors": weights(TENSORS, ("b.weight", at))})))
    assert len(seen) == 4


def test_whatever_else_changes_results_changes_it(tmp_path: Path) -> None:
    one = store(tmp_path / "one", {"model.safetensors": weights(TENSORS)})
    wider = store(tmp_path / "wider", {"model.safetensors": weights(TENSORS)}, {**CONFIG, "hidden_size": 128})
    renamed = {"a.weight": 40, "b.weight": 300_000, "d.weight": 17}
    other = store(tmp_path / "other", {"model.safetensors": weights(renamed)})
    bins = store(tmp_path / "bin", {"pytorch_model.bin": b"weights"})
    seen = {of(at) for at in (one, wider, other, bins)}
    seen |= {of(one, dtype="bfloat16"), of(one, quantization="int8"), of(one, engine="vllm")}
    assert len(seen) == 7
    assert of(one) in seen


def test_a_damaged_file_is_said(tmp_path: Path) -> None:
    damaged = store(tmp_path / "damaged", {"model.safetensors": weights(TENSORS)[:-1]})
    with pytest.raises(ModelLoadError, match="truncated"):
        of(damaged)


DEMO = Path("models/demo/model")


def with_vocabulary(at: Path, change: Callable[[dict], object]) -> None:
    tokenizer = json.loads((at / "tokenizer.json").read_text())
    change(tokenizer)
    (at / "tokenizer.json").write_text(json.dumps(tokenizer))


@pytest.mark.parametrize(
    ("change", "is_other"),
    [
        (lambda at: with_vocabulary(at, lambda t: t["model"]["vocab"].update(zzz=99_999)), True),
        (lambda at: with_vocabulary(at, lambda t: t["added_tokens"].append({"id": 7, "content": "<x>"})), True),
        # How text becomes tokens is the gateway's affair: token ids mean the same.
        (lambda at: (at / "tokenizer.json").write_text((at / "tokenizer.json").read_text() + "\n"), False),
        (lambda at: (at / "chat_template.jinja").unlink(), False),
        (lambda at: (at / "model.safetensors").unlink(), False),
    ],
)
def test_a_tokenizer_s_fingerprint_says_what_token_ids_mean(
    tmp_path: Path, change: Callable[[Path], object], is_other: bool
) -> None:
    copied = Path(shutil.copytree(DEMO, tmp_path / "model"))
    assert tokenizer_fingerprint(copied) == tokenizer_fingerprint(DEMO) != ""
    change(copied)
    assert (tokenizer_fingerprint(copied) != tokenizer_fingerprint(DEMO)) == is_other
    assert tokenizer_fingerprint(tmp_path) == ""


def test_a_fake_engine_has_that_of_what_decides_its_tokens() -> None:
    def fake(**settings: float) -> str:
        return FakeEngine(FakeSettings(**settings)).info.fingerprint

    assert fake() == fake(step_s=0.1, max_sequences=3, kv_total_tokens=5)
    assert fake() != fake(vocab_size=300)


def test_a_gateway_needs_neither_torch_nor_transformers_for_it() -> None:
    code = (
        "import sys; from pathlib import Path; from bucketserve.engine.fingerprint import tokenizer_fingerprint\n"
        f"print(tokenizer_fingerprint(Path({str(DEMO)!r}))); print({{'torch', 'transformers'}} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [tokenizer_fingerprint(DEMO), "set()"]


LORA: dict[str, object] = {"peft_type": "LORA", "r": 8}


def adapter(at: Path, content: bytes = weights(TENSORS), config: object = LORA) -> Path:
    at.mkdir()
    (at / "adapter_model.safetensors").write_bytes(content)
    (at / "adapter_config.json").write_text(json.dumps(config))
    return at


def test_an_adapter_is_what_is_in_its_files(tmp_path: Path) -> None:
    found = [
        adapter_fingerprint(adapter(tmp_path / f"{number}", *parts))
        for number, parts in enumerate(
            [
                (),
                (weights(dict(reversed(TENSORS.items()))), {**LORA, "base_model_name_or_path": "/elsewhere"}),
                (weights(TENSORS, ("b.weight", 299_999)),),
                (weights(TENSORS), {**LORA, "lora_alpha": 16}),
            ]
        )
    ]
    assert found[0] == found[1]
    assert len({*found}) == 3


@pytest.mark.parametrize(
    ("content", "config", "said"),
    [
        (weights(TENSORS)[:-1], LORA, "truncated"),
        (b"", LORA, "empty"),
        (b"x" * 100, LORA, "no safetensors file"),
        (weights({"a": 40}).replace(b"[0, 40]", b"[0,4.0]"), LORA, "no safetensors file"),
        (weights(TENSORS), {"peft_type": "IA3"}, "only LORA is served"),
        (weights(TENSORS), {}, "only LORA is served"),
        (weights(TENSORS), [], "must hold a JSON object"),
    ],
    ids=["cut", "empty", "junk", "places that are none", "other kind", "no kind", "a list"],
)
def test_what_is_no_adapter_is_told(tmp_path: Path, content: bytes, config: object, said: str) -> None:
    with pytest.raises(ModelLoadError, match=said):
        adapter_fingerprint(adapter(tmp_path / "a", content, config))


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_that_lacks_a_file_is_told(tmp_path: Path, name: str) -> None:
    (adapter(tmp_path / "a") / name).unlink()
    with pytest.raises(ModelLoadError, match=f"it has no {name}"):
        adapter_fingerprint(tmp_path / "a")
