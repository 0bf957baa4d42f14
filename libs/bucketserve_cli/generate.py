"""`bucketserve generate`: one prompt, its text as it comes, its figures at the end."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from typer import BadParameter

from bucketserve.client import BucketServeClient, Chunk, Event, Finished
from bucketserve.v1 import common_pb2
from bucketserve_cli.terminal import UINT32, InputError, as_json, in_range, print_json

__all__ = ["GenerateOptions", "parse_bias", "stream_generation"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateOptions:
    """How to continue the prompt."""

    model: str
    is_chat: bool
    max_tokens: int | None
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: dict[int, float]
    seed: int | None
    json_schema: str
    regex: str
    stop: tuple[str, ...]
    ignore_eos: bool
    is_batch: bool
    tenant: str
    ttft_ms: int | None
    timeout_s: float
    is_json: bool


def parse_bias(text: str) -> tuple[int, float]:
    """Returns token id and bias of TOKEN_ID=BIAS.

    Raises:
        InputError: it is none.
    """
    token_id, _, bias = text.partition("=")
    try:
        if not token_id.isdecimal() or int(token_id) > UINT32:
            raise ValueError
        return int(token_id), in_range(-100, 100)(bias)
    except (ValueError, BadParameter):
        raise InputError(f"--logit-bias {text!r}: TOKEN_ID=BIAS is needed, with a bias from -100 to 100") from None


async def stream_generation(client: BucketServeClient, prompt: str, options: GenerateOptions, errors: Console) -> None:
    """Writes the text to standard output as it comes, and one line of figures to `errors`; or all of it as JSON.

    Raises:
        BucketServeError: the request was refused or failed.
    """
    events = client.generate(
        prompt=None if options.is_chat else prompt,
        chat=[("user", prompt)] if options.is_chat else None,
        model=options.model,
        max_tokens=options.max_tokens,
        sampling=common_pb2.SamplingParams(
            temperature=options.temperature,
            top_p=options.top_p,
            top_k=options.top_k,
            min_p=options.min_p,
            repetition_penalty=options.repetition_penalty,
            presence_penalty=options.presence_penalty,
            frequency_penalty=options.frequency_penalty,
            logit_bias=options.logit_bias,
            seed=options.seed,
        ),
        structured_output=_structure(options),
        stop_strings=options.stop,
        ignore_eos=options.ignore_eos,
        is_batch=options.is_batch,
        tenant=options.tenant,
        slo=common_pb2.Slo(ttft_ms=options.ttft_ms),
        timeout_s=options.timeout_s,
    )
    if options.is_json:
        print_json(await _collected(events))
        return
    is_mid_line = False
    try:
        async for event in events:
            if isinstance(event, Chunk):
                sys.stdout.write(event.text)
                sys.stdout.flush()
                is_mid_line = True
            elif isinstance(event, Finished):
                sys.stdout.write("\n")
                is_mid_line = False
                errors.print(_figures(event), style="dim", markup=False, soft_wrap=True)
    finally:
        # What follows, an error or a shell's prompt, begins on a line of its own.
        if is_mid_line:
            sys.stdout.write("\n")


def _structure(options: GenerateOptions) -> common_pb2.StructuredOutput | None:
    if options.json_schema and options.regex:
        raise InputError("give one of --json-schema and --regex")
    if options.json_schema:
        return common_pb2.StructuredOutput(json_schema=options.json_schema)
    return common_pb2.StructuredOutput(regex=options.regex) if options.regex else None


async def _collected(events: AsyncIterator[Event]) -> dict[str, Any]:
    """Returns all that is told of a request."""
    found: dict[str, Any] = {}
    text, token_ids = list[str](), list[int]()
    async for event in events:
        if isinstance(event, Chunk):
            text.append(event.text)
            token_ids += event.token_ids
        else:
            found.update(as_json(event))
    found.pop("prompt_tokens", None)
    reason = found.pop("reason").removeprefix("FINISH_REASON_").lower()
    return {"text": "".join(text), "token_ids": token_ids, "finish_reason": reason, **found}


def _figures(finished: Finished) -> str:
    usage, timings, batch = finished.usage, finished.timings, finished.batch
    reason = common_pb2.FinishReason.Name(finished.reason).removeprefix("FINISH_REASON_").lower()
    rate = usage.output_tokens / timings.total_ms * 1e3 if timings.total_ms else 0.0
    return (
        f"{reason}: {usage.prompt_tokens} prompt + {usage.output_tokens} output tokens, "
        f"TTFT {timings.ttft_ms:.0f} ms (queue {timings.queue_ms:.0f}, prefill {timings.prefill_ms:.0f}), "
        f"{rate:.0f} tokens/s, bucket [{batch.bucket_low_tokens}, {batch.bucket_high_tokens}), "
        f"batch of {batch.num_requests}"
    )
