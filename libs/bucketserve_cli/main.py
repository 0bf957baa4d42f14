"""`bucketserve`: the command line."""

from __future__ import annotations

import asyncio
import csv
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from bucketserve import __version__
from bucketserve.client import BucketServeClient
from bucketserve.core.errors import SettingsError
from bucketserve.sim.errors import SimulationError
from bucketserve.sim.latency import CostMode
from bucketserve.sim.limits import OutputLimits
from bucketserve.sim.policies import POLICIES
from bucketserve.sim.scenarios import SCENARIOS
from bucketserve.sim.workload import WORKLOADS, Arrivals
from bucketserve.sync_client import SyncClient
from bucketserve.v1 import common_pb2
from bucketserve_cli import demo as demo_command
from bucketserve_cli.bench import BenchOptions, run_bench
from bucketserve_cli.chat import Conversation, run_chat
from bucketserve_cli.connection import ApiKey, Connection, checked_key, connects
from bucketserve_cli.generate import GenerateOptions, parse_bias, stream_generation
from bucketserve_cli.job import job_app
from bucketserve_cli.keys import keys_app
from bucketserve_cli.pools import pool_lines, pools_of, roles_of
from bucketserve_cli.services import config_app, gateway, scheduler, worker
from bucketserve_cli.sim import SimOptions, option_slo, parse_settings, run_simulation
from bucketserve_cli.sim_tables import run_comparison, run_scenarios
from bucketserve_cli.stack import LocalStack, StackError, StackSpec
from bucketserve_cli.status import show_status
from bucketserve_cli.supervise import interrupted_by_signals, keep_running
from bucketserve_cli.terminal import UINT32, Commands, InputError, an_address, console, errors, in_range, print_error

__all__ = ["app"]

app = typer.Typer(
    cls=Commands,
    add_completion=False,
    # An error that nobody expected is a defect, whose traceback should be as Python writes it.
    pretty_exceptions_enable=False,
)
app.add_typer(config_app, name="config")
app.add_typer(job_app, name="job")
app.add_typer(keys_app, name="keys")
for service in (gateway, scheduler, worker):
    app.command()(service)

ServedOption = Annotated[str, typer.Option("--model", help="served model; may be left out if there is one")]
ModelOption = Annotated[str, typer.Option("--model", help="directory of a causal LM, or hf://organisation/name")]
AddressOption = Annotated[str, typer.Option(help="host:port of the gateway", callback=an_address)]
SECONDS = in_range(0, 1e6, low_open=True)
RATE = in_range(0, 1e6, low_open=True)
SEED_MAX = 2**63 - 1

DEMO_MODEL = Path(__file__).resolve().parents[2] / "models" / "demo" / "model"


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        print(f"bucketserve {__version__}")
        raise typer.Exit


@app.callback()
def _any_command(
    version: Annotated[
        bool, typer.Option("--version", help="print the version and leave", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """BucketServe: LLM serving over gRPC with adaptive length buckets."""


def default_model() -> str:
    """Returns the small model of a source checkout; empty if this is not one."""
    for candidate in (DEMO_MODEL, Path.cwd() / "models" / "demo" / "model"):
        if (candidate / "config.json").exists():
            return str(candidate)
    return ""


def _model(model: str, engine: str) -> str:
    model = model or default_model()
    if not model and engine != "fake":
        raise InputError("no model: give --model DIR_OR_ID (the demo model is in the source repository)")
    return model


def _pairs(option: str, pairs: list[str], form: str) -> dict[str, str]:
    values: dict[str, str] = {}
    for pair in pairs:
        name, found, value = pair.partition("=")
        if not (name.strip() and found and value.strip()):
            raise InputError(f"{option} {pair!r}: write {form}")
        if name.strip() in values:
            raise InputError(f"{option} {name.strip()!r} is given twice")
        values[name.strip()] = value.strip()
    return values


class EngineKind(StrEnum):
    """What runs the model."""

    TRANSFORMERS = "transformers"
    VLLM = "vllm"
    FAKE = "fake"


@app.command()
def up(
    model: ModelOption = "",
    model_name: Annotated[str, typer.Option(help="name that clients use; default: demo")] = "",
    workers: Annotated[int | None, typer.Option(min=1, max=64, help="worker processes; default: 1")] = None,
    roles: Annotated[
        str, typer.Option(help="role of each worker: both, prefill or decode, separated by commas; replaces --workers")
    ] = "",
    engine: Annotated[EngineKind | None, typer.Option(help="what runs the model; default: transformers")] = None,
    engine_arg: Annotated[
        list[str] | None, typer.Option(help="name=value: an argument of vLLM's own, for --engine vllm; may be repeated")
    ] = None,
    pool: Annotated[
        list[str] | None,
        typer.Option(
            help="workers of one model, for several: model_name=NAME,model=DIR,workers=N and any setting of a worker "
            "(engine, role, device, ...), or a JSON object of texts; may be repeated; replaces the options above",
            metavar="NAME=VALUE,...",
        ),
    ] = None,
    alias: Annotated[
        list[str] | None, typer.Option(help="a further name of a model; may be repeated", metavar="NAME=MODEL")
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(min=0, max=65534, help="port of the API, the next is the scheduler's; 0: any; default: 50051"),
    ] = None,
    redis_url: Annotated[str, typer.Option(help="Redis or Valkey to use; default: an embedded one")] = "",
    otlp_endpoint: Annotated[str, typer.Option(help="OTLP gRPC endpoint for traces, http://host:4317")] = "",
    log_dir: Annotated[Path | None, typer.Option(help="keep the services' logs here")] = None,
) -> None:
    """Start the whole stack on this machine and keep it running until Ctrl-C, which drains it; a second one hurries.

    Settings of the environment and of the file that BUCKETSERVE_CONFIG names hold, where no option says otherwise.
    """
    of_one_pool: dict[str, object] = {
        "--model": model,
        "--model-name": model_name,
        "--workers": workers,
        "--roles": roles,
        "--engine": engine,
        "--engine-arg": engine_arg,
    }
    spec = StackSpec(
        model=model,
        default_model=default_model(),
        model_name=model_name,
        num_workers=workers or 1,
        roles=roles_of(roles),
        engine=engine.value if engine else "",
        engine_args=_pairs("--engine-arg", engine_arg or [], "name=value, such as tensor_parallel_size=2"),
        pools=pools_of(pool or [], of_one_pool),
        aliases=_pairs("--alias", alias or [], "NAME=MODEL"),
        port=port,
        redis_url=redis_url,
        log_dir=log_dir,
        environ={"BUCKETSERVE_TELEMETRY_OTLP_ENDPOINT": otlp_endpoint} if otlp_endpoint else {},
    )

    def say(line: str) -> None:
        console.print(f"  {line}", highlight=False, markup=False)

    try:
        stack = LocalStack(spec, say)
        for each in stack.workers:
            _model(each["model"], each.get("engine") or stack.settings.value("worker", "engine"))
        with interrupted_by_signals(stack), stack:
            console.print(
                f"\n[bold green]ready[/]  gateway {stack.gateway_address}  model{'s' if len(stack.models) > 1 else ''} "
                f"{escape(', '.join(stack.models))}"
            )
            for line in pool_lines(stack.workers):
                console.print(f"       {line}", highlight=False, markup=False)
            for name, meant in stack.aliases.items():
                console.print(f"       alias  {name}: {meant}", highlight=False, markup=False)
            if stack.http_address:
                scheme = "https" if stack.deployment.tls else "http"
                console.print(f"       OpenAI API {scheme}://{stack.http_address}/v1", highlight=False)
            console.print(f"       scheduler {stack.scheduler_address}")
            scheme = "https" if stack.settings.value("tls", "metrics") else "http"
            for name, address in stack.metrics_addresses.items():
                console.print(f"       {name} metrics {scheme}://{address}/metrics", highlight=False)
            console.print(
                f"try    bucketserve generate --address {stack.gateway_address} "
                + (f"--model {escape(stack.spec.model_name)} " if len(stack.models) > 1 else "")
                + '"And the king said"\n'
                f"       bucketserve status --address {stack.scheduler_address}\n"
                "Ctrl-C drains and stops; a second one cuts what still runs.",
                highlight=False,
            )
            keep_running(stack, say)
            console.print("draining ...")
    except (StackError, SettingsError) as error:
        print_error(str(error))
        raise typer.Exit(2 if isinstance(error, SettingsError) else 1) from None
    console.print("stopped")


@app.command()
def demo(
    model: ModelOption = "",
    workers: Annotated[int, typer.Option(min=1, max=16, help="worker processes")] = 2,
    api_key: ApiKey = "",
) -> None:
    """Start the stack, send short and long prompts at once, show the text streaming, then a table."""
    try:
        demo_command.run_demo(_model(model, "transformers"), workers, console, checked_key(api_key))
    except StackError as error:
        print_error(str(error))
        raise typer.Exit(1) from None


@app.command()
@connects
def generate(
    prompt: Annotated[str, typer.Argument(help="text to continue; - reads standard input")],
    address: AddressOption = "127.0.0.1:50051",
    model: ServedOption = "",
    chat: Annotated[bool, typer.Option(help="send the prompt as a user's turn")] = False,
    max_tokens: Annotated[int | None, typer.Option(min=1, max=UINT32, help="most tokens to generate")] = None,
    temperature: Annotated[float, typer.Option(parser=in_range(0, 100), help="0 is greedy")] = 0.0,
    top_p: Annotated[float, typer.Option(parser=in_range(0, 1, low_open=True), help="1 keeps all tokens")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, max=UINT32, help="0 keeps all tokens")] = 0,
    min_p: Annotated[float, typer.Option(parser=in_range(0, 1), help="0 keeps all tokens")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(parser=in_range(0, 100, low_open=True), help="1: none")] = 1.0,
    presence_penalty: Annotated[float, typer.Option(parser=in_range(-2, 2), help="on tokens generated so far")] = 0.0,
    frequency_penalty: Annotated[float, typer.Option(parser=in_range(-2, 2), help="the same, for each time")] = 0.0,
    logit_bias: Annotated[
        list[str] | None, typer.Option(help="TOKEN_ID=BIAS, from -100 to 100; may be repeated", metavar="ID=BIAS")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, max=2**64 - 1, help="the same one gives the same text")] = None,
    json_schema: Annotated[str, typer.Option(help="JSON schema that the output must fit")] = "",
    regex: Annotated[str, typer.Option(help="regular expression that the whole output must match")] = "",
    stop: Annotated[list[str] | None, typer.Option(help="text that ends the output; may be repeated")] = None,
    ignore_eos: Annotated[bool, typer.Option(help="go on past the model's end token")] = False,
    batch: Annotated[bool, typer.Option(help="class batch rather than interactive")] = False,
    tenant: Annotated[str, typer.Option(help="who asks")] = "",
    ttft_ms: Annotated[int | None, typer.Option(min=1, max=UINT32, help="SLO: time to first token")] = None,
    timeout: Annotated[float, typer.Option(parser=SECONDS, help="deadline in seconds")] = 300.0,
    is_json: Annotated[
        bool, typer.Option("--json", help="print text and figures as one JSON object at the end")
    ] = False,
    *,
    connection: Connection,
) -> None:
    """Continue a prompt; the text streams to standard output, the figures to standard error."""
    options = GenerateOptions(
        model=model,
        is_chat=chat,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        logit_bias=dict(parse_bias(each) for each in logit_bias or ()),
        seed=seed,
        json_schema=json_schema,
        regex=regex,
        stop=tuple(stop or ()),
        ignore_eos=ignore_eos,
        is_batch=batch,
        tenant=tenant,
        ttft_ms=ttft_ms,
        timeout_s=timeout,
        is_json=is_json,
    )
    text = _standard_input() if prompt == "-" else prompt

    async def main() -> None:
        async with BucketServeClient(address, tls=connection.tls, api_key=connection.api_key) as client:
            await stream_generation(client, text, options, errors)

    asyncio.run(main())


def _standard_input() -> str:
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise InputError(
            f"standard input is not UTF-8: byte {error.start} is 0x{error.object[error.start]:02x}"
        ) from None


@app.command()
@connects
def chat(
    address: AddressOption = "127.0.0.1:50051",
    model: ServedOption = "",
    system: Annotated[str, typer.Option(help="what the model is told first")] = "",
    max_tokens: Annotated[int | None, typer.Option(min=1, max=UINT32, help="most tokens of an answer")] = None,
    temperature: Annotated[float, typer.Option(parser=in_range(0, 100), help="0 is greedy")] = 0.0,
    top_p: Annotated[float, typer.Option(parser=in_range(0, 1, low_open=True), help="1 keeps all tokens")] = 1.0,
    seed: Annotated[int | None, typer.Option(min=0, max=2**64 - 1, help="the same one gives the same text")] = None,
    tenant: Annotated[str, typer.Option(help="who asks")] = "",
    timeout: Annotated[float, typer.Option(parser=SECONDS, help="deadline of an answer, seconds")] = 300.0,
    *,
    connection: Connection,
) -> None:
    """Talk to a model, line by line: at a terminal, or with the lines of a pipe. /reset, /system TEXT, /quit."""
    with SyncClient(address, tls=connection.tls, api_key=connection.api_key) as client:
        run_chat(
            client,
            Conversation(system),
            model=model,
            max_tokens=max_tokens,
            sampling=common_pb2.SamplingParams(temperature=temperature, top_p=top_p, seed=seed),
            tenant=tenant,
            timeout_s=timeout,
        )


@app.command()
@connects
def status(
    address: Annotated[
        list[str] | None, typer.Option(help="host:port of a scheduler; repeated: whichever of them leads")
    ] = None,
    watch: Annotated[float, typer.Option(parser=in_range(0, 86_400), help="repeat every so many seconds")] = 0.0,
    is_json: Annotated[bool, typer.Option("--json", help="print a line of JSON each time")] = False,
    *,
    connection: Connection,
) -> None:
    """Show workers, headroom, buckets and queues, of each model as the scheduler that leads it sees them."""
    addresses = [an_address(each) for each in address or ["127.0.0.1:50052"]]
    asyncio.run(show_status(addresses, connection, watch, console, is_json=is_json))


@app.command()
@connects
def bench(
    address: AddressOption = "127.0.0.1:50051",
    model: ServedOption = "",
    requests: Annotated[
        Path | None, typer.Option(help="JSON with requests[] of prompt_ids and output_len, sent in order")
    ] = None,
    trace: Annotated[Path | None, typer.Option(help="CSV (.gz) of arrival_s, prompt_tokens, output_tokens")] = None,
    workload: Annotated[str, typer.Option(help="lengths, without a file: " + ", ".join(WORKLOADS))] = "mixed",
    number: Annotated[
        int | None, typer.Option(min=1, max=10_000_000, help="how many; default: all of a file, else 100")
    ] = None,
    rate: Annotated[
        float | None, typer.Option(parser=RATE, help="open loop: requests per second; default: closed loop")
    ] = None,
    arrivals: Annotated[Arrivals, typer.Option(help="how they arrive in an open loop")] = Arrivals.POISSON,
    concurrency: Annotated[int, typer.Option(min=1, max=100_000, help="closed loop: requests at once")] = 64,
    ttft: Annotated[float, typer.Option(parser=SECONDS, help="SLO: time to first token, seconds")] = 2.0,
    tpot: Annotated[float, typer.Option(parser=SECONDS, help="SLO: seconds per further token")] = 0.2,
    seed: Annotated[int, typer.Option(min=0, max=SEED_MAX, help="of all draws")] = 0,
    timeout: Annotated[float, typer.Option(parser=SECONDS, help="deadline of each request, seconds")] = 600.0,
    json_path: Annotated[Path | None, typer.Option("--json", help="write figures and every request here")] = None,
    *,
    connection: Connection,
) -> None:
    """Send load to a gateway and show TTFT, TPOT, tokens/s and goodput."""
    options = BenchOptions(
        address=address,
        connection=connection,
        model=model,
        requests=requests,
        trace=trace,
        workload=workload,
        number=number,
        rate_rps=rate,
        arrivals=arrivals,
        concurrency=concurrency,
        ttft_s=ttft,
        tpot_s=tpot,
        seed=seed,
        timeout_s=timeout,
        json_path=json_path,
    )

    if asyncio.run(run_bench(options, console, errors)).failed:
        raise typer.Exit(1)


@app.command()
def sim(
    policy: Annotated[str, typer.Option(help=", ".join(POLICIES))] = "adaptive",
    workload: Annotated[str, typer.Option(help=", ".join(WORKLOADS))] = "mixed",
    trace: Annotated[
        Path | None,
        typer.Option(help="CSV of arrival_s, prompt_tokens, output_tokens, or JSONL with block hashes (.gz)"),
    ] = None,
    cost: Annotated[CostMode, typer.Option(help="what a step costs: padded to its longest prompt, or packed")] = (
        CostMode.PACKED
    ),
    cluster: Annotated[
        str, typer.Option(help="such as 4xboth or 1xprefill+3xdecode; default: the policy's best split of --workers")
    ] = "",
    workers: Annotated[int, typer.Option(min=1, max=10_000, help="workers, without --cluster")] = 4,
    device: Annotated[str, typer.Option(help="packaged device model, or a JSON file")] = "a100-40gb-13b",
    rate: Annotated[
        float | None, typer.Option(parser=RATE, help="arrivals per second; default: as recorded, or 1 a worker")
    ] = None,
    find_capacity: Annotated[
        float | None,
        typer.Option(parser=in_range(0, 1, low_open=True), help="search the highest rate with this SLO attainment"),
    ] = None,
    requests: Annotated[int, typer.Option(min=1, max=10_000_000, help="requests per run, at least")] = 1000,
    span: Annotated[
        float | None,
        typer.Option(
            parser=in_range(0, 1e6),
            help="seconds over which they arrive, at least; default: 10 times the longest request alone",
        ),
    ] = None,
    arrivals: Annotated[Arrivals, typer.Option(help="how requests arrive")] = Arrivals.POISSON,
    burstiness: Annotated[
        float, typer.Option(parser=in_range(0, 100, low_open=True), help="coefficient of variation of gamma gaps")
    ] = 2.0,
    context: Annotated[int, typer.Option(min=0, max=10**7, help="context in tokens; 0: the device model's")] = 0,
    ttft: Annotated[float, typer.Option(parser=in_range(0, 1e6), help="SLO: fixed part of TTFT, seconds")] = 0.25,
    ttft_factor: Annotated[
        float, typer.Option(parser=in_range(0, 1e6), help="SLO: multiple of the unloaded prefill")
    ] = 3.0,
    tpot: Annotated[float, typer.Option(parser=SECONDS, help="SLO: seconds per further token")] = 0.1,
    limits: Annotated[
        OutputLimits, typer.Option(help="max_tokens as clients choose it, or exactly the output")
    ] = OutputLimits.CLIENT,
    batch_share: Annotated[
        float, typer.Option(parser=in_range(0, 1), help="share of batch-class requests, which have no SLO")
    ] = 0.0,
    reject_early: Annotated[bool, typer.Option(help="requests ask to be refused if their TTFT can't be met")] = False,
    seed: Annotated[int, typer.Option(min=0, max=SEED_MAX, help="of all draws")] = 0,
    turn_ms: Annotated[
        float, typer.Option(parser=in_range(0, 1e6), help="least time between two decisions; 0: every event")
    ] = 0.0,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="a setting of the core, NAME=VALUE; may be repeated")
    ] = None,
    compare: Annotated[
        str, typer.Option(help="capacities at 80, 95, 99% of these policies side by side: adaptive,chunked or all")
    ] = "",
    seeds: Annotated[int, typer.Option(min=1, max=1000, help="with --compare: runs from --seed on")] = 1,
    scenario: Annotated[str, typer.Option(help="a public complaint: " + ", ".join([*SCENARIOS, "all"]))] = "",
    json_path: Annotated[Path | None, typer.Option("--json", help="write the figures here")] = None,
) -> None:
    """Simulate a cluster in virtual time: the production core or a rival policy under a workload."""
    try:
        if rate is None and arrivals is not Arrivals.RECORDED and find_capacity is None:
            rate = float(workers)
        options = SimOptions(
            policy=policy,
            workload=workload,
            trace=trace,
            cost=cost,
            cluster=cluster,
            workers=workers,
            device=device,
            rate_rps=rate,
            find_capacity=find_capacity,
            requests=requests,
            min_span_s=span,
            arrivals=arrivals,
            burstiness_cv=burstiness,
            limits=limits,
            batch_share=batch_share,
            context_tokens=context,
            slo=option_slo(ttft, ttft_factor, tpot, reject_early),
            seed=seed,
            turn_s=turn_ms / 1e3,
            settings=parse_settings(settings or []),
            json_path=json_path,
        )
        if scenario:
            run_scenarios(scenario, options, console)
        elif compare:
            run_comparison(compare, seeds, options, console, errors)
        else:
            run_simulation(options, console, errors)
    except (SimulationError, ValueError, EOFError, csv.Error) as error:
        raise InputError(str(error)) from None


if __name__ == "__main__":
    app()
