"""`bucketserve`: the command line."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Annotated

import grpc
import typer
from rich.console import Console
from rich.table import Table

from bucketserve.client import BucketServeClient
from bucketserve.config import Section, TelemetrySettings, load_settings
from bucketserve.core.errors import BucketServeError, SettingsError
from bucketserve.sim.latency import CostMode
from bucketserve.sim.policies import POLICIES
from bucketserve.sim.workload import WORKLOADS, Arrivals
from bucketserve_cli import demo as demo_command
from bucketserve_cli.bench import BenchOptions, run_bench
from bucketserve_cli.generate import GenerateOptions, stream_generation
from bucketserve_cli.job import job_app
from bucketserve_cli.sim import SimOptions, option_slo, parse_settings, run_simulation
from bucketserve_cli.stack import LocalStack, StackError, StackSpec
from bucketserve_cli.status import show_status

__all__ = ["app"]

app = typer.Typer(
    help="BucketServe: LLM serving over gRPC with adaptive length buckets.", no_args_is_help=True, add_completion=False
)
config_app = typer.Typer(help="Settings.", no_args_is_help=True)
app.add_typer(config_app, name="config")
app.add_typer(job_app, name="job")

console = Console()
errors = Console(stderr=True)

ModelOption = Annotated[str, typer.Option("--model", help="directory or hub id of a Hugging Face causal LM")]
AddressOption = Annotated[str, typer.Option(help="host:port of the gateway")]

DEMO_MODEL = Path(__file__).resolve().parents[2] / "models" / "demo" / "model"


def default_model() -> str:
    """Returns the small model of a source checkout; empty if this is not one."""
    for candidate in (DEMO_MODEL, Path.cwd() / "models" / "demo" / "model"):
        if (candidate / "config.json").exists():
            return str(candidate)
    return ""


def _model_or_exit(model: str, engine: str) -> str:
    model = model or default_model()
    if not model and engine != "fake":
        errors.print("[red]error:[/] no model: give --model DIR_OR_ID (the demo model is in the source repository)")
        raise typer.Exit(2)
    return model


def _roles_or_exit(roles: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in roles.split(",") if name.strip())
    if unknown := [name for name in names if name not in ("both", "prefill", "decode")]:
        errors.print(f"[red]error:[/] --roles {unknown[0]!r}: a role is both, prefill or decode")
        raise typer.Exit(2)
    if names and "both" not in names and not {"prefill", "decode"} <= set(names):
        errors.print("[red]error:[/] --roles: prefill workers need a decode worker, and the other way round")
        raise typer.Exit(2)
    return names


@app.command()
def up(
    model: ModelOption = "",
    model_name: Annotated[str, typer.Option(help="name that clients use")] = "demo",
    workers: Annotated[int, typer.Option(min=1, max=64, help="worker processes")] = 1,
    roles: Annotated[
        str, typer.Option(help="role of each worker: both, prefill or decode, separated by commas; replaces --workers")
    ] = "",
    engine: Annotated[str, typer.Option(help="transformers or fake")] = "transformers",
    port: Annotated[
        int, typer.Option(min=0, max=65534, help="port of the API, the next is the scheduler's; 0: any")
    ] = 50051,
    redis_url: Annotated[str, typer.Option(help="Redis or Valkey to use; default: an embedded one")] = "",
    otlp_endpoint: Annotated[str, typer.Option(help="OTLP gRPC endpoint for traces, http://host:4317")] = "",
    log_dir: Annotated[Path | None, typer.Option(help="keep the services' logs here")] = None,
) -> None:
    """Start the whole stack on this machine and keep it running until Ctrl-C, which drains it."""
    spec = StackSpec(
        model=_model_or_exit(model, engine),
        model_name=model_name,
        num_workers=workers,
        roles=_roles_or_exit(roles),
        engine=engine,
        port=port,
        redis_url=redis_url,
        log_dir=log_dir,
        environ={"BUCKETSERVE_TELEMETRY_OTLP_ENDPOINT": otlp_endpoint} if otlp_endpoint else {},
    )
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    try:
        with LocalStack(spec, lambda line: console.print(f"  {line}", highlight=False)) as stack:
            console.print(f"\n[bold green]ready[/]  gateway {stack.gateway_address}  model {model_name}")
            console.print(f"       scheduler {stack.scheduler_address}")
            for name, address in stack.metrics_addresses.items():
                console.print(f"       {name} metrics http://{address}/metrics", highlight=False)
            console.print(
                f'try    bucketserve generate --address {stack.gateway_address} "And the king said"\n'
                f"       bucketserve status --address {stack.scheduler_address}\nCtrl-C drains and stops.",
                highlight=False,
            )
            while not stop.wait(0.5):
                for name, service in stack.services.items():
                    if service.exit_status is not None:
                        errors.print(f"[red]{name} ended with status {service.exit_status}[/]\n{service.log_tail()}")
                        raise typer.Exit(1)
            console.print("draining ...")
    except StackError as error:
        errors.print(f"[red]error:[/] {error}", highlight=False)
        raise typer.Exit(1) from None
    console.print("stopped")


@app.command()
def demo(
    model: ModelOption = "",
    workers: Annotated[int, typer.Option(min=1, max=16, help="worker processes")] = 2,
) -> None:
    """Start the stack, send short and long prompts at once, show the text streaming, then a table."""
    try:
        demo_command.run_demo(_model_or_exit(model, "transformers"), workers, console)
    except (StackError, BucketServeError) as error:
        errors.print(f"[red]error:[/] {error}", highlight=False)
        raise typer.Exit(1) from None


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="text to continue; - reads standard input")],
    address: AddressOption = "127.0.0.1:50051",
    model: Annotated[str, typer.Option("--model", help="served model; may be left out if there is one")] = "",
    chat: Annotated[bool, typer.Option(help="send the prompt as a user's turn")] = False,
    max_tokens: Annotated[int | None, typer.Option(min=1)] = None,
    temperature: Annotated[float, typer.Option(min=0.0)] = 0.0,
    top_p: Annotated[float, typer.Option()] = 1.0,
    top_k: Annotated[int, typer.Option(min=0)] = 0,
    min_p: Annotated[float, typer.Option()] = 0.0,
    repetition_penalty: Annotated[float, typer.Option()] = 1.0,
    seed: Annotated[int | None, typer.Option(min=0)] = None,
    stop: Annotated[list[str] | None, typer.Option(help="text that ends the output; may be repeated")] = None,
    ignore_eos: Annotated[bool, typer.Option(help="go on past the model's end token")] = False,
    batch: Annotated[bool, typer.Option(help="class batch rather than interactive")] = False,
    tenant: Annotated[str, typer.Option()] = "",
    ttft_ms: Annotated[int | None, typer.Option(min=1, help="SLO: time to first token")] = None,
    timeout: Annotated[float, typer.Option(help="deadline in seconds")] = 300.0,
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
        seed=seed,
        stop=tuple(stop or ()),
        ignore_eos=ignore_eos,
        is_batch=batch,
        tenant=tenant,
        ttft_ms=ttft_ms,
        timeout_s=timeout,
    )
    text = sys.stdin.read() if prompt == "-" else prompt

    async def main() -> None:
        async with BucketServeClient(address) as client:
            await stream_generation(client, text, options, errors)

    _run(main())


@app.command()
def status(
    address: Annotated[str, typer.Option(help="host:port of the scheduler")] = "127.0.0.1:50052",
    watch: Annotated[float, typer.Option(min=0.0, help="repeat every so many seconds")] = 0.0,
) -> None:
    """Show workers, headroom, buckets and queues."""
    _run(show_status(address, watch, console))


@app.command()
def bench(
    address: AddressOption = "127.0.0.1:50051",
    model: Annotated[str, typer.Option("--model", help="served model; may be left out if there is one")] = "",
    requests: Annotated[
        Path | None, typer.Option(help="JSON with requests[] of prompt_ids and output_len, sent in order")
    ] = None,
    trace: Annotated[Path | None, typer.Option(help="CSV (.gz) of arrival_s, prompt_tokens, output_tokens")] = None,
    workload: Annotated[str, typer.Option(help="lengths, without a file: " + ", ".join(WORKLOADS))] = "mixed",
    number: Annotated[int | None, typer.Option(min=1, help="how many; default: all of a file, else 100")] = None,
    rate: Annotated[float | None, typer.Option(help="open loop: requests per second; default: closed loop")] = None,
    arrivals: Annotated[Arrivals, typer.Option(help="how they arrive in an open loop")] = Arrivals.POISSON,
    concurrency: Annotated[int, typer.Option(min=1, help="closed loop: requests at once")] = 64,
    ttft: Annotated[float, typer.Option(help="SLO: time to first token, seconds")] = 2.0,
    tpot: Annotated[float, typer.Option(help="SLO: seconds per further token")] = 0.2,
    seed: Annotated[int, typer.Option(help="of all draws")] = 0,
    timeout: Annotated[float, typer.Option(help="deadline of each request, seconds")] = 600.0,
    json_path: Annotated[Path | None, typer.Option("--json", help="write figures and every request here")] = None,
) -> None:
    """Send load to a gateway and show TTFT, TPOT, tokens/s and goodput."""
    options = BenchOptions(
        address=address,
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

    async def main() -> None:
        report = await run_bench(options, console, errors)
        if report.failed:
            raise typer.Exit(1)

    _run(main())


def _service(module: str, assignments: list[str], config: Path | None) -> None:
    section = module.removeprefix("bucketserve_")
    environ = dict(os.environ)
    if config is not None:
        environ["BUCKETSERVE_CONFIG"] = str(config)
    for assignment in assignments:
        name, separator, value = assignment.partition("=")
        if not separator:
            errors.print(f"[red]error:[/] --set {assignment}: write --set NAME=VALUE")
            raise typer.Exit(2)
        group, dot, field = name.rpartition(".")
        environ[f"BUCKETSERVE_{(group if dot else section).upper()}_{field.upper()}"] = value
    # The service replaces this process: signals, standard streams and exit status are its own.
    os.execve(sys.executable, [sys.executable, "-m", module], environ)


SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="a setting, NAME=VALUE or telemetry.NAME=VALUE; may be repeated")
]
ConfigOption = Annotated[Path | None, typer.Option(help="TOML file with settings")]


@app.command()
def gateway(settings: SetOption = None, config: ConfigOption = None) -> None:
    """Run one gateway in the foreground."""
    _service("bucketserve_gateway", settings or [], config)


@app.command()
def scheduler(settings: SetOption = None, config: ConfigOption = None) -> None:
    """Run one scheduler in the foreground."""
    _service("bucketserve_scheduler", settings or [], config)


@app.command()
def worker(settings: SetOption = None, config: ConfigOption = None) -> None:
    """Run one worker in the foreground."""
    _service("bucketserve_worker", settings or [], config)


@app.command()
def sim(
    policy: Annotated[str, typer.Option(help=", ".join(POLICIES))] = "adaptive",
    workload: Annotated[str, typer.Option(help=", ".join(WORKLOADS))] = "mixed",
    trace: Annotated[Path | None, typer.Option(help="CSV (.gz) of arrival_s, prompt_tokens, output_tokens")] = None,
    cost: Annotated[CostMode, typer.Option(help="what a step costs: padded to its longest prompt, or packed")] = (
        CostMode.PACKED
    ),
    cluster: Annotated[
        str, typer.Option(help="such as 4xboth or 1xprefill+3xdecode; default: the policy's best split of --workers")
    ] = "",
    workers: Annotated[int, typer.Option(min=1, help="workers, without --cluster")] = 4,
    device: Annotated[str, typer.Option(help="packaged device model, or a JSON file")] = "a100-40gb-13b",
    rate: Annotated[float | None, typer.Option(help="arrivals per second; default: as recorded, or 1 a worker")] = None,
    find_capacity: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="search the highest rate with this SLO attainment")
    ] = None,
    requests: Annotated[int, typer.Option(min=1, help="requests per run, at least")] = 2000,
    span: Annotated[float, typer.Option(min=0.0, help="seconds over which they arrive, at least")] = 60.0,
    arrivals: Annotated[Arrivals, typer.Option(help="how requests arrive")] = Arrivals.POISSON,
    burstiness: Annotated[float, typer.Option(help="coefficient of variation of gamma gaps")] = 2.0,
    context: Annotated[int, typer.Option(min=0, help="context in tokens; 0: the device model's")] = 0,
    ttft: Annotated[float, typer.Option(help="SLO: fixed part of TTFT, seconds")] = 0.25,
    ttft_factor: Annotated[float, typer.Option(help="SLO: multiple of the unloaded prefill")] = 3.0,
    tpot: Annotated[float, typer.Option(help="SLO: seconds per further token")] = 0.1,
    output_slack: Annotated[float, typer.Option(min=1.0, help="max_tokens as a multiple of the true output")] = 1.0,
    reject_early: Annotated[bool, typer.Option(help="requests ask to be refused if their TTFT can't be met")] = False,
    seed: Annotated[int, typer.Option(help="of all draws")] = 0,
    turn_ms: Annotated[float, typer.Option(min=0.0, help="least time between two decisions; 0: every event")] = 0.0,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="a setting of the core, NAME=VALUE; may be repeated")
    ] = None,
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
            context_tokens=context,
            slo=option_slo(ttft, ttft_factor, tpot, output_slack, reject_early),
            seed=seed,
            turn_s=turn_ms / 1e3,
            settings=parse_settings(settings or []),
            json_path=json_path,
        )
        run_simulation(options, console, errors)
    except (BucketServeError, ValueError, OSError) as error:
        errors.print(f"[red]error:[/] {error}", highlight=False)
        raise typer.Exit(2) from None


@config_app.command("show")
def config_show(config: ConfigOption = None) -> None:
    """Show every setting in force and where it comes from."""
    from bucketserve_gateway.settings import GatewaySettings
    from bucketserve_scheduler.settings import SchedulerSettings
    from bucketserve_worker.settings import WorkerSettings

    sections: dict[str, type[Section]] = {
        "gateway": GatewaySettings,
        "scheduler": SchedulerSettings,
        "worker": WorkerSettings,
        "telemetry": TelemetrySettings,
    }
    try:
        loaded = load_settings(sections, environ=os.environ, file=config)
    except SettingsError as error:
        errors.print(f"[red]error:[/] {error}", highlight=False)
        raise typer.Exit(2) from None
    table = Table("section", "setting", "value", "from", "meaning", box=None)
    for section, field, value, source in loaded.describe():
        meaning = sections[section].model_fields[field].description or ""
        table.add_row(section, field, value, source, meaning, style="" if source == "default" else "bold")
    console.print(table)


def _run(main: object) -> None:
    """Runs a client command; what goes wrong becomes one line and an exit status."""
    try:
        asyncio.run(main)  # type: ignore[arg-type]
    except BucketServeError as error:
        errors.print(f"[red]error:[/] {error}", highlight=False)
        raise typer.Exit(1) from None
    except grpc.aio.AioRpcError as error:
        errors.print(f"[red]error:[/] {error.code().name}: {error.details()}", highlight=False)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


if __name__ == "__main__":
    app()
