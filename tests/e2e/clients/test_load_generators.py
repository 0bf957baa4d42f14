"""AIPerf and GuideLLM complete a run over OpenAI's API, and what they count is what was served."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bucketserve_cli.stack import LocalStack
from tests.e2e.clients.environment import output
from tests.e2e.conftest import DEMO_MODEL
from tests.e2e.observe import metric

pytestmark = [pytest.mark.e2e, pytest.mark.clients, pytest.mark.timeout(400)]

REQUESTS, TOKENS = 50, 32
FAST = {"BUCKETSERVE_WORKER_FAKE_DECODE_US_PER_STEP": "2000"}


async def aiperf(stack: LocalStack, folder: Path) -> None:
    code, out, errors = await output(
        *("aiperf", "profile", "--url", f"http://{stack.http_address}", "--model", "demo"),
        *("--tokenizer", DEMO_MODEL, "--endpoint-type", "chat", "--streaming", "--use-server-token-count"),
        *("--synthetic-input-tokens-mean", 64, "--output-tokens-mean", TOKENS, "--extra-inputs", "ignore_eos:true"),
        *("--concurrency", 8, "--request-count", REQUESTS, "--workers-max", 1, "--record-processor-service-count", 1),
        *("--ui", "none", "--artifact-dir", folder),
        timeout_s=300,
    )
    assert code == 0, out + errors
    found = json.loads((folder / "profile_export_aiperf.json").read_text())
    assert found["request_count"]["avg"] == REQUESTS
    assert found["error_summary"] == []
    assert found["output_sequence_length"]["avg"] == TOKENS
    assert found["time_to_first_token"]["avg"] > 0
    served(stack)


async def guidellm(stack: LocalStack, folder: Path) -> None:
    code, out, errors = await output(
        *("guidellm", "run", "--backend", f"kind=openai_http,target=http://{stack.http_address},model=demo"),
        *("--tokenizer", f"kind=huggingface_auto,model={DEMO_MODEL}"),
        *("--data", f"kind=synthetic_text,prompt_tokens=64,output_tokens={TOKENS}"),
        *("--profile", "kind=concurrent,streams=8", "--constraint", f"kind=max_requests,count={REQUESTS}"),
        *("--output", f"kind=json,path={folder / 'report.json'}", "--disable-progress"),
        timeout_s=300,
    )
    assert code == 0, out + errors
    (benchmark,) = json.loads((folder / "report.json").read_text())["benchmarks"]
    totals = benchmark["metrics"]["request_totals"]
    assert (totals["successful"], totals["errored"]) == (REQUESTS, 0)
    tokens = benchmark["metrics"]["output_token_count"]["successful"]
    assert (tokens["mean"], tokens["count"]) == (TOKENS, REQUESTS)
    served(stack)


def served(stack: LocalStack) -> None:
    """So many requests ended well, and none otherwise."""
    ended = metric(stack, "gateway", "bucketserve_gateway_requests_total")
    assert ended == metric(stack, "gateway", "bucketserve_gateway_requests_total", outcome="length") >= REQUESTS


@pytest.mark.stack(environ=FAST)
@pytest.mark.parametrize("generator", [aiperf, guidellm])
async def test_a_run_against_the_fake_engine(generator, stack: LocalStack, tmp_path: Path) -> None:
    await generator(stack, tmp_path)


@pytest.mark.stack(engine="transformers")
@pytest.mark.parametrize("generator", [aiperf, guidellm])
async def test_a_run_against_the_demo_model(generator, stack: LocalStack, tmp_path: Path) -> None:
    await generator(stack, tmp_path)
