"""Tries every causal LM family of transformers with a small random model, and writes the table in docs/models.md.

Without arguments all of them are tried (minutes) and the table is written; names as arguments try those only and print
what comes out. A family is "right" if greedy tokens of a mixed batch (prompts in pieces, joining at different times,
longer than windows and chunks) equal those of transformers' generate, token for token in float32. A family that is
served and not right ends the script with an error.
"""

from __future__ import annotations

import random
import re
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from bucketserve.core.errors import ModelLoadError
from bucketserve.core.types import RequestId
from bucketserve.engine.attention import NAME
from bucketserve.engine.loader import LoadSettings, build_engine
from bucketserve.engine.packed import PackedEngine
from bucketserve.engine.pretrained import refusing_other_attention
from bucketserve.ports import SequenceSpec

DOC = Path(__file__).resolve().parent.parent / "docs" / "models.md"
BEGIN, END = "<!-- families: written by make families -->", "<!-- end of families -->"

VERDICTS = ("right", "refused", "not tried")

VOCAB = 320
CONTEXT = 256
PROMPTS = (3, 21, 40, 77)
NEW_TOKENS = 8
MOST_WEIGHTS = 100_000_000
"""A family whose sizes these settings do not make small is not tried."""

# Names of one thing differ from family to family; each takes those that it knows.
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": CONTEXT, "initializer_range": 0.15,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0, "sliding_window": 24, "attention_chunk_size": 32,
    "moe_intermediate_size": 32, "num_experts": 4, "n_routed_experts": 4, "num_local_experts": 4,
    "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "n_embd": 64, "n_layer": 4, "n_head": 4,
    "n_positions": CONTEXT, "d_model": 64, "decoder_layers": 4, "encoder_layers": 2, "decoder_attention_heads": 4,
    "encoder_attention_heads": 4, "decoder_ffn_dim": 96, "encoder_ffn_dim": 96, "vocab_size_per_layer_input": VOCAB,
    "hidden_size_per_layer_input": 16, "global_head_dim": 32,
}  # fmt: skip
OTHER_SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "depth": 1, "num_attention_heads": 2,
    "num_heads": 2, "num_layers": 1, "out_hidden_size": 64, "conf_num_hidden_layers": 1,
}  # fmt: skip
"""Of what looks at images and sound."""
LATENT: dict[str, Any] = {
    "head_dim": 16, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16,
    "v_head_dim": 24, "num_key_value_heads": 4,
}  # fmt: skip
"""Latent attention (MLA), whose values have a size of their own."""
MAMBA = {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_chunk_size": 16}
OWN: dict[str, dict[str, Any]] = {
    "axk1": LATENT,
    "codegen": {"rotary_dim": 16},
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "falcon": {"head_dim": None},
    "falcon_h1": MAMBA,
    "gemma3n_text": {"num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "gemma4": {"num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "gemma4_text": {"num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "glm4_moe_lite": LATENT,
    "gpt_neo": {"num_layers": 4, "attention_types": [[["global", "local"], 2]]},
    "helium": {"head_dim": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": LATENT,
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "minicpm3": {**LATENT, "head_dim": 32},
    "youtu": LATENT,
    "zaya": {"num_experts_per_tok": 1},
}
"""What a family needs beside the sizes; None for a size that it can't be given."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a family."""

    verdict: str
    """right, refused, not tried, or wrong."""
    detail: str = ""


def small_config(name: str) -> Any:
    """Returns a configuration of the family with small sizes."""
    family = CONFIG_MAPPING[name]
    parts = {
        part: _sizes(part_of, SIZES if "text" in part else OTHER_SIZES)
        for part, part_of in family.sub_configs.items()
        if part.endswith("_config") and hasattr(part_of, "model_type")
    }
    if "text_config" in parts:
        parts["text_config"] |= OWN.get(name, {})
        return family(**parts)
    wanted = {**_sizes(family, SIZES), **OWN.get(name, {})}
    return family(**{size: value for size, value in wanted.items() if value is not None})


def _sizes(family: Any, sizes: dict[str, Any]) -> dict[str, Any]:
    """Returns the sizes that a family's configuration knows."""
    known = family()
    found = {size: value for size, value in sizes.items() if _knows(known, size)}
    if not getattr(known, "sliding_window", None):
        # Of families that have windows as an option, without them; transformers' caches would cut what layers see.
        found.pop("sliding_window", None)
    return found


def _knows(config: Any, size: str) -> bool:
    try:
        return hasattr(config, size)
    except Exception:  # some sizes may differ from layer to layer, and then can't be asked for
        return False


def small_model(config: Any, attention: str) -> torch.nn.Module:
    """Returns a model with random weights, the same for the same configuration."""
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).float().eval()
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for parameter in model.parameters():
            # Norms, sinks and biases are born as ones and zeros, where some mistakes would not show.
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def try_family(name: str) -> Outcome:
    """Returns what comes of serving a small model of the family."""
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(small_config(name))
        number = sum(parameter.numel() for parameter in model.parameters())
    except Exception as error:  # families check their sizes in their own ways
        return Outcome("not tried", f"its sizes need more than these settings: {type(error).__name__}")
    if number > MOST_WEIGHTS:
        return Outcome("not tried", "not small by these settings")
    settings = LoadSettings(model=name, context_tokens=CONTEXT, kv_budget_tokens=600, max_step_tokens=64)
    try:
        with refusing_other_attention():
            served = small_model(small_config(name), NAME)
        engine = build_engine(served, settings)
    except ModelLoadError as error:
        return Outcome("refused", str(error).partition("can't be served: ")[2] or str(error))
    plain = small_model(small_config(name), "eager")
    prompts = [_prompt(length) for length in PROMPTS]
    found = _serve(engine, prompts)
    wanted = [_generate(plain, prompt) for prompt in prompts]
    wrong = [length for length, a, b in zip(PROMPTS, found, wanted, strict=True) if a != b]
    return Outcome("wrong", f"prompts of {wrong} tokens") if wrong else Outcome("right")


def _prompt(length: int) -> list[int]:
    rng = random.Random(length)
    return [rng.randrange(2, VOCAB) for _ in range(length)]


def _serve(engine: PackedEngine, prompts: list[list[int]]) -> list[list[int]]:
    outputs: dict[str, list[int]] = {f"r{i}": [] for i in range(len(prompts))}
    for i, prompt in enumerate(prompts):
        spec = SequenceSpec(request_id=RequestId(f"r{i}"), token_ids=tuple(prompt), max_new_tokens=NEW_TOKENS)
        engine.add([spec], 13)
        _step(engine, outputs)
    while engine.has_work():
        _step(engine, outputs)
    return list(outputs.values())


def _step(engine: PackedEngine, outputs: dict[str, list[int]]) -> None:
    for token in engine.step().tokens:
        if token.token_id is not None:
            outputs[token.request_id].append(token.token_id)


@torch.inference_mode()
def _generate(model: Any, prompt: list[int]) -> list[int]:
    output = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return [int(token) for token in output[0, len(prompt) :]]


def table(outcomes: dict[str, Outcome]) -> str:
    """Returns the outcomes as Markdown."""
    lines = [f"Tried with transformers {transformers.__version__}, in float32."]
    for verdict in VERDICTS:
        reasons: dict[str, list[str]] = {}
        for name, outcome in sorted(outcomes.items()):
            if outcome.verdict == verdict:
                reasons.setdefault(outcome.detail, []).append(f"`{name}`")
        number = sum(map(len, reasons.values()))
        lines += ["", f"### {verdict.capitalize()}: {number}", "", "| families | why |", "|---|---|"]
        lines += [f"| {', '.join(names)} | {reason.replace('|', '/')} |" for reason, names in sorted(reasons.items())]
    return "\n".join(lines)


def listed(document: str) -> dict[str, Outcome]:
    """Returns the outcomes that table() wrote into a document."""
    outcomes = {}
    for part in document.partition(BEGIN)[2].partition(END)[0].split("\n### ")[1:]:
        verdict = part.partition(":")[0].lower()
        for row in part.splitlines():
            if row.startswith("| `"):
                _, names, reason, _ = row.split("|")
                outcomes |= {name: Outcome(verdict, reason.strip()) for name in re.findall("`(.+?)`", names)}
    return outcomes


def main(names: list[str]) -> int:
    """Tries the families; without names all of them, and writes the table."""
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    outcomes = {}
    for name in names or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        try:
            outcomes[name] = try_family(name)
        except Exception as error:
            outcomes[name] = Outcome("wrong", f"{type(error).__name__}: {error}")
        print(f"{name:24} {outcomes[name].verdict:10} {outcomes[name].detail}", flush=True)
    if not names and all(outcome.verdict in VERDICTS for outcome in outcomes.values()):
        before, _, rest = DOC.read_text().partition(BEGIN)
        DOC.write_text(f"{before}{BEGIN}\n\n{table(outcomes)}\n\n{END}{rest.partition(END)[2]}")
    return int(any(outcome.verdict == "wrong" for outcome in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
