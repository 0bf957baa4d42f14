"""One peer, all requests at once, in its own virtual environment. Driven by benchmarks/compare.py through pipes.

It prints "ready" when loaded and warm, then for each line on its standard input runs the requests once and prints a
JSON object with seconds, tokens (without stop tokens) and, of vLLM, each request's seconds to its first token. Nothing
of BucketServe is imported here.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


class Request(NamedTuple):
    """What is asked for."""

    prompt: list[int]
    max_tokens: int
    stop_token_ids: list[int]


Run = Callable[[list[Request]], tuple[int, list[float]]]
"""Returns output tokens, and seconds to first tokens."""

CONTINUOUS_BLOCKS = 160
"""KV of 40,960 tokens, in blocks of 256."""
CONTINUOUS_STEP_TOKENS = 512
"""Tokens of a step of transformers' continuous batching. On a CPU it computes attention of all of them over the KV of
all sequences and masks what is not theirs, so its own default of 8,192 wastes much."""


def vllm(model: str, dtype: str, quantization: str, kv_tokens: int | None) -> Run:
    """VLLM's offline engine: LLM.generate."""
    from vllm import LLM, SamplingParams

    engine = LLM(
        model=model,
        dtype=dtype,
        skip_tokenizer_init=True,
        max_model_len=2048,
        max_num_seqs=64,
        enable_prefix_caching=False,
        # They say when a request had its first token.
        disable_log_stats=False,
        **({"quantization": quantization} if quantization else {}),
        # One block is never given out. Of 32 tokens, the fewest with its fast kernels, little of a limit is left over.
        **({"num_gpu_blocks_override": kv_tokens // 32 + 1, "block_size": 32} if kv_tokens else {}),
    )

    def run(requests: list[Request]) -> tuple[int, list[float]]:
        outputs = engine.generate(
            [{"prompt_token_ids": request.prompt} for request in requests],
            [
                SamplingParams(temperature=0, max_tokens=n, stop_token_ids=stops, ignore_eos=True, detokenize=False)
                for _, n, stops in requests
            ],
            use_tqdm=False,
        )
        tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
        num_stopped = sum(output.outputs[0].finish_reason == "stop" for output in outputs)
        return tokens - num_stopped, [output.metrics.first_token_latency for output in outputs]

    return run


def _transformers(model: str, dtype: str, attention: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(os.cpu_count() or 1)
    return AutoModelForCausalLM.from_pretrained(model, dtype=dtype, attn_implementation=attention).eval()


def static(model: str, dtype: str, quantization: str, kv_tokens: int | None) -> Run:
    """transformers, batches of 16 in order of arrival, padded on the left to the longest, run to the longest output."""
    import torch

    llm = _transformers(model, dtype, "sdpa")

    def run(requests: list[Request]) -> tuple[int, list[float]]:
        tokens = 0
        for begin in range(0, len(requests), 16):
            batch = requests[begin : begin + 16]
            longest = max(len(prompt) for prompt, _, _ in batch)
            ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt, _, _ in batch])
            mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt, _, _ in batch])
            number = max(n for _, n, _ in batch)
            with torch.inference_mode():
                llm.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    do_sample=False,
                    max_new_tokens=number,
                    min_new_tokens=number,
                    pad_token_id=0,
                )
            # Only what was asked for counts.
            tokens += sum(n for _, n, _ in batch)
        return tokens, []

    return run


def continuous(model: str, dtype: str, quantization: str, kv_tokens: int | None) -> Run:
    """Transformers' continuous batching, through its manager.

    generate_batch would have one output length for all, and would make the paged cache again in every call (seconds on
    a CPU); the manager is kept, and each request gets the length that it asked for. Prefixes are not shared between
    rounds. max_batch_tokens: see CONTINUOUS_STEP_TOKENS.
    """
    from transformers import GenerationConfig
    from transformers.generation import ContinuousBatchingConfig

    llm = _transformers(model, dtype, "sdpa")
    manager = llm.init_continuous_batching(
        GenerationConfig(max_new_tokens=2048, do_sample=False, eos_token_id=-1, pad_token_id=0),
        ContinuousBatchingConfig(
            num_blocks=CONTINUOUS_BLOCKS, max_batch_tokens=CONTINUOUS_STEP_TOKENS, allow_block_sharing=False
        ),
    )
    manager.start()

    def run(requests: list[Request]) -> tuple[int, list[float]]:
        for prompt, n, _ in requests:
            manager.add_request(list(prompt), max_new_tokens=n, eos_token_id=-1)
        tokens = ended = 0
        while ended < len(requests):
            result = manager.get_result(timeout=1)
            if result is None and not manager.is_running():
                raise SystemExit("continuous batching ended; its error is above")
            if result is not None and result.is_finished():
                if result.error is not None:
                    raise SystemExit(f"a request failed: {result.error}")
                tokens += len(result.generated_tokens)
                ended += 1
        return tokens, []

    return run


ENGINES = {"vllm": vllm, "static": static, "continuous": continuous}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--quantization", default="")
    parser.add_argument("--kv-tokens", type=int, help="of vllm: most tokens of KV")
    parser.add_argument("--requests", type=Path, required=True)
    options = parser.parse_args()
    rows = json.loads(options.requests.read_text())
    requests = [Request(row["prompt_ids"], row["max_tokens"], row["stop_token_ids"]) for row in rows]
    # Libraries and their child processes write to standard output as well: they get standard error instead.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    run = ENGINES[options.engine](options.model, options.dtype, options.quantization, options.kv_tokens)
    run([Request(request.prompt[:64], 4, []) for request in requests[:8]])
    print("ready", file=answers, flush=True)
    for _ in sys.stdin:
        start_s = time.perf_counter()
        tokens, ttfts_s = run(requests)
        answer = {"seconds": time.perf_counter() - start_s, "output_tokens": tokens, "ttfts_s": ttfts_s}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
