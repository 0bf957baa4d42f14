"""A model that can't be served is refused at once, in one sentence that names what is missing or damaged."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig

from bucketserve.core.errors import ModelLoadError
from bucketserve.engine import loader
from bucketserve.engine.loader import LoadSettings, load_engine
from bucketserve_gateway.models import load_models
from scripts.model_families import small_config

pytestmark = pytest.mark.engine

DEMO = Path("models/demo/model")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARDS = [f"model-{i:05}-of-00003.safetensors" for i in (1, 2, 3)]

Damage = Callable[[Path], object]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with the demo model's tokenizer, in one file of weights."""
    directory = tmp_path_factory.mktemp("whole")
    config = small_config("llama")
    config.vocab_size = 4096
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    GenerationConfig(eos_token_id=[0, 7]).save_pretrained(directory)
    for name in TOKENIZER:
        shutil.copy(DEMO / name, directory)
    return directory


@pytest.fixture
def model(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def change(name: str, **changes: object) -> Damage:
    def damage(at: Path) -> None:
        document = {**json.loads((at / name).read_text()), **changes}
        (at / name).write_text(json.dumps({key: value for key, value in document.items() if value is not ...}))

    return damage


def write(name: str, content: str | bytes) -> Damage:
    data = content.encode() if isinstance(content, str) else content
    return lambda at: (at / name).write_bytes(data)


def cut(name: str, keep: float) -> Damage:
    return lambda at: os.truncate(at / name, int((at / name).stat().st_size * keep))


def remove(*names: str) -> Damage:
    return lambda at: [(at / name).unlink() for name in names]


def rename(name: str, to: str) -> Damage:
    return lambda at: (at / name).rename(at / to)


def shard(at: Path) -> None:
    AutoModelForCausalLM.from_pretrained(at).save_pretrained(at, max_shard_size="700KB")
    (at / WEIGHTS).unlink(missing_ok=True)
    assert sorted(path.name for path in at.glob("model-*.safetensors")) == SHARDS


def sharded(damage: Damage) -> Damage:
    return lambda at: (shard(at), damage(at))


def stored_as(name: str, dtype: torch.dtype) -> Damage:
    def damage(at: Path) -> None:
        tensors = load_file(at / WEIGHTS)
        save_file({**tensors, name: tensors[name].to(dtype)}, at / WEIGHTS, metadata={"format": "pt"})

    return damage


def only(*names: str) -> Damage:
    return lambda at: [path.unlink() for path in at.iterdir() if path.name not in names]


BOTH = {
    "config-missing": (remove("config.json"), "it has no config.json; it has "),
    "config-empty": (write("config.json", ""), "config.json is not valid JSON: "),
    "config-broken": (write("config.json", '{"model_type": "llama",'), "config.json is not valid JSON: .* line 1"),
    "config-binary": (write("config.json", b"\xff\xfe\x00"), "config.json is not valid JSON"),
    "config-list": (write("config.json", "[]"), "config.json must hold a JSON object, not list"),
    "config-deep": (write("config.json", "[" * 100_000), "config.json is not valid JSON"),
    "no-model-type": (change("config.json", model_type=...), "config.json names no model_type"),
    "model-type-number": (change("config.json", model_type=3), "config.json names no model_type"),
    "unknown-model-type": (change("config.json", model_type="wonder"), "'wonder' is unknown to transformers"),
    "own-code": (change("config.json", model_type="wonder", auto_map={}), "code of its own, which is not run"),
    "architecture": (change("config.json", architectures=["LlamaModel"]), "LlamaModel, which is no causal LM"),
    "classifier": (change("config.json", architectures=["BertForMaskedLM"]), "BertForMaskedLM, which is no causal LM"),
    "field-of-another-type": (change("config.json", num_attention_heads="x"), "rejects config.json: .*attention_heads"),
    "no-heads": (change("config.json", num_attention_heads=0), "transformers rejects config.json: "),
    "generation-broken": (write("generation_config.json", "{"), "generation_config.json is not valid JSON"),
    "generation-eos": (change("generation_config.json", eos_token_id="</s>"), "eos_token_id in generation_config.json"),
    "config-eos": (change("config.json", eos_token_id=[1, 2.5]), "eos_token_id in config.json|rejects config.json"),
    "generation-rejected": (
        change("generation_config.json", cache_implementation="bogus"),
        "transformers rejects generation_config.json: .*cache_implementation",
    ),
    "tokenizer-broken": (cut("tokenizer.json", 0.5), "tokenizer.json is not valid JSON"),
    "tokenizer-config-broken": (write("tokenizer_config.json", "{,}"), "tokenizer_config.json is not valid JSON"),
    "special-tokens-broken": (write("special_tokens_map.json", "null"), "must hold a JSON object, not NoneType"),
    "gguf": (lambda at: (only()(at), write("model.Q4_K_M.gguf", b"GGUF")(at)), "it holds GGUF files"),
    "adapter": (lambda at: (only()(at), write("adapter_config.json", "{}")(at)), r"it holds an adapter \(LoRA\)"),
    "empty-directory": (only(), "it has no config.json; it is empty"),
    "directory-for-a-file": (
        lambda at: (remove("config.json")(at), (at / "config.json").mkdir()),
        "config.json can't be read: Is a directory",
    ),
}  # fmt: skip
OF_TOKENIZER = {
    "no-tokenizer": (remove("tokenizer.json"), "it has no tokenizer: tokenizer.json is missing"),
    "only-sentencepiece": (rename("tokenizer.json", "tokenizer.model"), "tokenizer.model and no tokenizer.json"),
    "tokenizer-of-nothing": (write("tokenizer.json", "{}"), "transformers rejects its tokenizer: "),
    "tokenizer-without-model": (
        write("tokenizer.json", '{"version": "1.0", "model": null}'),
        "transformers rejects its tokenizer: ",
    ),
    "template": (write("chat_template.jinja", "{% for m in messages %}\n{{ m }"), "does not compile: line 2"),
    "template-unknown-tag": (write("chat_template.jinja", "{% wonder %}"), "does not compile: line 1: .*wonder"),
}
OF_WEIGHTS = {
    "truncated": (cut(WEIGHTS, 0.6), r"model.safetensors is truncated: it has [\d,]+ of [\d,]+ bytes"),
    "one-byte-short": (lambda at: os.truncate(at / WEIGHTS, (at / WEIGHTS).stat().st_size - 1), "is truncated"),
    "truncated-header": (lambda at: os.truncate(at / WEIGHTS, 100), "is truncated: it ends within its header"),
    "empty": (write(WEIGHTS, b""), "model.safetensors is empty"),
    "seven-bytes": (write(WEIGHTS, b"1234567"), "is no safetensors file"),
    "a-page-of-html": (write(WEIGHTS, b"<!DOCTYPE html>" * 200), "is no safetensors file"),
    "a-pointer-of-lfs": (write(WEIGHTS, b"version https://git-lfs.github.com/spec/v1\n"), "is no safetensors file"),
    "none": (remove(WEIGHTS), "it has no weights: neither model.safetensors nor"),
    "of-another-name": (rename(WEIGHTS, "consolidated.safetensors"), "it has consolidated.safetensors"),
    "shard-missing": (sharded(remove(SHARDS[1])), "names model-00002-of-00003.safetensors"),
    "shard-truncated": (sharded(cut(SHARDS[2], 0.5)), "model-00003-of-00003.safetensors is truncated"),
    "shard-swapped": (
        sharded(lambda at: shutil.copy(at / SHARDS[0], at / SHARDS[1])),
        "says that model-0000[12]-of-00003.safetensors holds .*, and it does not",
    ),
    "index-broken": (sharded(write(INDEX, "{")), f"{INDEX} is not valid JSON"),
    "index-without-map": (sharded(write(INDEX, "{}")), "has no weight_map"),
    "more-layers": (change("config.json", num_hidden_layers=6), "its weights lack 18 of .* model.layers.4"),
    "other-sizes": (
        change("config.json", intermediate_size=128),
        r"do not fit config.json: .*.0.mlp.down_proj.weight is \[64, 96\], not \[64, 128\] \(12 such tensors\)",
    ),
    "integers": (
        stored_as("model.layers.0.mlp.up_proj.weight", torch.int8),
        "model.layers.0.mlp.up_proj.weight is stored as I8, and config.json has no quantization_config",
    ),
    "8-bit-floats": (stored_as("model.embed_tokens.weight", torch.float8_e4m3fn), "is stored as F8_E4M3, and config"),
    "unknown-quantisation": (
        change("config.json", quantization_config={"quant_method": "wonder"}),
        r"quantised by 'wonder' \(quant_method\), which transformers does not know",
    ),
    "unnamed-quantisation": (change("config.json", quantization_config={"bits": 4}), "quant"),
    "missing-library": (
        change("config.json", quantization_config={"quant_method": "gptq", "bits": 4}),
        "transformers rejects its weights: .*GPTQ.* requires",
    ),
    "no-causal-lm": (change("config.json", model_type="t5"), "'t5' is no causal LM|transformers rejects config.json"),
    "unknown-rope": (
        change("config.json", rope_parameters={"rope_type": "wonder", "rope_theta": 1e4}),
        "transformers rejects (config.json|its weights): .*wonder",
    ),
    "no-layers": (change("config.json", num_hidden_layers=0), "config.json gives it no layers"),
    "old-format-broken": (lambda at: (at / WEIGHTS).rename(at / "pytorch_model.bin"), "rejects its weights"),
}  # fmt: skip


def by_worker(source: object) -> str:
    with pytest.raises(ModelLoadError) as caught:
        load_engine(LoadSettings(model=str(source), kv_budget_tokens=300, max_step_tokens=64, kernels="torch"))
    return str(caught.value)


def by_gateway(source: object) -> str:
    with pytest.raises(ModelLoadError) as caught:
        load_models({"m": str(source)}, 16)
    return str(caught.value)


def check(said: str, source: object, says: str) -> str:
    """One line that names the source; returns what is said of it."""
    assert repr(str(source)) in said and "\n" not in said
    _, _, problem = said.partition("can't be loaded: ") if "can't be loaded" in said else said.partition("served: ")
    assert re.search(says, problem), said
    assert len(problem) < 400
    return problem


def test_the_whole_model_is_served(model: Path) -> None:
    settings = LoadSettings(model=str(model), kv_budget_tokens=300, max_step_tokens=64, kernels="torch")
    assert load_engine(settings).info.context_tokens == 256
    shard(model)
    assert load_engine(settings).info.context_tokens == 256
    assert load_models({"m": str(model)}, 16).get("m").card.context_tokens == 256


@pytest.mark.parametrize("case", BOTH)
def test_what_both_read_is_refused_by_both_in_the_same_words(model: Path, case: str) -> None:
    damage, says = BOTH[case]
    damage(model)
    assert check(by_worker(model), model, says) == check(by_gateway(model), model, says)


@pytest.mark.parametrize("case", OF_TOKENIZER)
def test_a_tokenizer_that_is_no_use_is_refused_by_the_gateway(model: Path, case: str) -> None:
    damage, says = OF_TOKENIZER[case]
    damage(model)
    check(by_gateway(model), model, says)


@pytest.mark.parametrize("case", ["tokenizer-of-nothing", "tokenizer-without-model"])
def test_a_damaged_tokenizer_is_refused_by_the_worker_too(model: Path, case: str) -> None:
    damage, says = OF_TOKENIZER[case]
    damage(model)
    check(by_worker(model), model, says)


@pytest.mark.parametrize("case", OF_WEIGHTS)
def test_weights_that_are_not_whole_are_refused_by_the_worker(model: Path, case: str) -> None:
    damage, says = OF_WEIGHTS[case]
    damage(model)
    check(by_worker(model), model, says)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("/nowhere/model", "there is no such directory$"),
        ("modles/demo", "there is no such directory; for a model of the Hugging Face hub write hf://modles/demo"),
        ("demo", "there is no such directory$"),
        ("./models/demo/modle", "there is no such directory$"),
        ("models/demo/model/config.json", "it is a file; give the directory"),
        ("models/demo/model/config.json/x", "can't be read: Not a directory"),
        ("m" * 5000, "can't be read: File name too long"),
        ("", "it has no config.json"),
    ],
)
def test_a_mistyped_directory_never_goes_to_the_network(
    source: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: pytest.fail("asked the network"))
    assert check(by_worker(source), source, says) == check(by_gateway(source), source, says)


def test_a_model_of_the_hub_that_is_not_to_be_had_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr("socket.getaddrinfo", unreachable)
    for source in ("hf://no/where", "hf://", "hf://a/b/c", "hf://../x"):
        assert check(by_worker(source), source, "the hub does not give it: ") == check(
            by_gateway(source), source, "hub"
        )


def test_what_may_not_be_read_is_said(model: Path) -> None:
    # Nothing is forbidden to root: read as somebody else.
    is_root = os.geteuid() == 0
    for folder in (model, *model.parents):
        if folder.stat().st_uid == os.geteuid() and folder.is_relative_to(tempfile.gettempdir()):
            folder.chmod(folder.stat().st_mode | 0o055)
    for name, readers in {"config.json": (by_worker, by_gateway), WEIGHTS: (by_worker,)}.items():
        (model / name).chmod(0)
        for read in readers:
            if is_root:
                os.seteuid(65534)
            try:
                check(read(model), model, f"^{name} can't be read: Permission denied")
            finally:
                if is_root:
                    os.seteuid(0)
        (model / name).chmod(0o644)


def test_the_service_ends_with_that_sentence_and_a_status(model: Path) -> None:
    (model / WEIGHTS).write_bytes(b"")
    environment = {**os.environ, "BUCKETSERVE_WORKER_MODEL": str(model), "BUCKETSERVE_WORKER_LISTEN": "127.0.0.1:0"}
    done = subprocess.run(
        [sys.executable, "-m", "bucketserve_worker"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == f"error: model {str(model)!r} can't be loaded: {WEIGHTS} is empty"


@pytest.mark.parametrize("settings", [{}, {"quantization": "int8"}, {"dtype": "bfloat16"}])
def test_weights_need_room_as_they_are_loaded_not_as_they_are_stored(
    model: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, str]
) -> None:
    stored = {name: tensor.bfloat16() for name, tensor in load_file(model / WEIGHTS).items()}
    save_file(stored, model / WEIGHTS, metadata={"format": "pt"})
    # Some repositories have the same once more, by another name.
    shutil.copy(model / WEIGHTS, model / "consolidated.safetensors")
    size = 2 * sum(tensor.numel() for tensor in stored.values())
    needed = size if "dtype" in settings else 2 * size
    given = LoadSettings(model=str(model), kv_budget_tokens=100, **settings)
    memory = loader.machine_memory
    monkeypatch.setattr(loader, "machine_memory", lambda: replace(memory(), available=needed - 1))
    with pytest.raises(ModelLoadError, match=r"loaded in (float32.*set dtype to bfloat16|bfloat16.*more, or)"):
        load_engine(given)
    monkeypatch.setattr(loader, "machine_memory", lambda: replace(memory(), available=needed))
    loader._check_room(model, getattr(torch, settings.get("dtype", "float32")))


# --- which tokens end a text ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("generation", "config", "tokenizer", "wanted"),
    [
        ([6, 5], 7, "<|endoftext|>", (0, 5, 6)),
        (5, [7, 5], "<|user|>", (1, 5)),
        (..., [9, 7], "<|user|>", (1, 7, 9)),
        (99_999, ..., "<|user|>", (1,)),
        (..., 7, ..., (7,)),
        (..., None, "<|endoftext|>", (0,)),
        (-1, ..., "<|endoftext|>", (0,)),
        (None, ..., ..., ()),
    ],
)
def test_which_tokens_end_a_text(
    model: Path, generation: object, config: object, tokenizer: object, wanted: tuple[int, ...]
) -> None:
    change("generation_config.json", eos_token_id=generation)(model)
    change("config.json", eos_token_id=config)(model)
    change("tokenizer_config.json", eos_token=tokenizer)(model)
    change("special_tokens_map.json", eos_token=tokenizer)(model)
    assert load_models({"m": str(model)}, 16).get("m").card.eos_token_ids == wanted
