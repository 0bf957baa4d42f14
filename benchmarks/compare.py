"""Output tokens per second beside the peers: same model, same requests, same cores, in turn (A B C A B C ...), one run.

    benchmarks/peers/setup.sh DIR                      once; about 3 GB
    python benchmarks/reference_model.py MODEL         once
    python benchmarks/compare.py --peers DIR --model MODEL --requests FILE --jsonl OUT \
        --mode float32 --mode int8 --peer vllm:float32 --peer static:float32

BucketServe is measured through its whole stack: a gRPC client, gateway, scheduler, Valkey and a worker as processes of
this machine. Everybody is loaded once and warm; whoever is not measured is stopped (SIGSTOP). All requests are
submitted at once; greedy, end tokens ignored. With --max-tokens that is the limit of each, and a stop token ends its
output; with --kv-tokens that is the KV of each system: both of vLLM and ours alone. TTFT is from when all are
submitted. A peer that ends, or that takes longer than --peer-timeout-s for one run, is left out from then on, and the
table says so.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from conditions import Records, Row, conditions, peer_versions
from peers.process import OfflinePeer, PeerError
from reference_requests import Request, read_requests, write_requests
from reference_stack import MODES, OURS, ReferenceStack, end_on_signals, send
from rich.console import Console
from rich.table import Table

from bucketserve.client import BucketServeClient
from bucketserve.sim.percentiles import nearest_rank

ENGINES = ("vllm", "static", "continuous")
Ran = tuple[float, int, list[float]]
"""Seconds, output tokens, and the seconds to first tokens if they are known."""
Run = Callable[[], Ran]


def run_ours(ours: ReferenceStack, requests: list[Request]) -> Ran:
    """Runs all requests at once through the gateway."""

    async def all_of_them() -> Ran:
        async with BucketServeClient(ours.address) as client:
            start_s = time.perf_counter()
            outcomes = await asyncio.gather(*(send(client, request) for request in requests))
            seconds = time.perf_counter() - start_s
        if errors := [outcome.error for outcome in outcomes if outcome.error]:
            raise SystemExit(f"{ours.name}: {len(errors)} requests failed: {errors[0]}")
        ttfts_s = [outcome.first_s - start_s for outcome in outcomes if outcome.first_s is not None]
        return seconds, sum(outcome.output_tokens for outcome in outcomes), ttfts_s

    ours.go()
    try:
        return asyncio.run(all_of_them())
    finally:
        ours.halt()


def _peer(text: str) -> tuple[str, str]:
    engine, _, dtype = text.partition(":")
    if engine not in ENGINES:
        raise argparse.ArgumentTypeError(f"{text}: ENGINE:DTYPE, ENGINE one of {', '.join(ENGINES)}")
    return engine, dtype or "float32"


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, required=True, help="where benchmarks/peers/setup.sh put them")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--requests", type=Path, help="JSON with requests[] of prompt_ids and output_len; else drawn")
    parser.add_argument(
        "--max-tokens", type=int, help="limit of every request, as far as the context goes; needs the model that counts"
    )
    parser.add_argument("--kv-tokens", type=int, help="tokens of KV that each system has; of vLLM and ours")
    parser.add_argument("--every", type=int, default=1, help="take every n-th request only, for a slow peer")
    parser.add_argument("--mode", choices=MODES, action="append", help="of ours; default: float32, bfloat16, int8")
    parser.add_argument(
        "--peer",
        type=_peer,
        action="append",
        metavar="ENGINE:DTYPE",
        help=f"ENGINE one of {', '.join(ENGINES)}; default: each in float32, and vllm:bfloat16",
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer-timeout-s", type=float, default=600.0, help="most seconds of a peer for all requests")
    parser.add_argument("--jsonl", type=Path, help="where the raw figures go, as they come")
    parser.add_argument("--logs", type=Path, default=Path(tempfile.gettempdir()), help="folder for the peers' logs")
    options = parser.parse_args()
    options.mode = options.mode or ["float32", "bfloat16", "int8"]
    bounded = options.max_tokens is not None or options.kv_tokens is not None
    engines = ENGINES[:1] if bounded else ENGINES
    options.peer = options.peer or [*((engine, "float32") for engine in engines), ("vllm", "bfloat16")]
    if unbounded := {engine for engine, _ in options.peer}.difference(engines):
        parser.error(f"--max-tokens and --kv-tokens are not for {', '.join(sorted(unbounded))}")
    return options


def main() -> None:
    """Measures and reports."""
    options = parse()
    end_on_signals()
    console = Console(width=140)
    requests = [request.limited(options.max_tokens) for request in read_requests(options.requests)[:: options.every]]
    output_tokens = sum(request.output_tokens for request in requests)
    settings = {
        "requests": len(requests),
        "prompt_tokens": sum(len(request.prompt_ids) for request in requests),
        "output_tokens": output_tokens,
        "max_tokens": options.max_tokens,
        "kv_tokens": options.kv_tokens,
        "peer_timeout_s": options.peer_timeout_s,
        "peer_versions": peer_versions(options.peers),
    }
    with ExitStack() as stack:
        records = stack.enter_context(Records(options.jsonl, conditions(**settings)))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        file = write_requests(requests, folder / "requests.json")
        runs: dict[str, Run] = {}
        for engine, dtype in options.peer:
            name = f"{engine} {dtype}"
            console.print(f"loading {name} ...", highlight=False)
            try:
                peer = OfflinePeer(
                    engine,
                    dtype,
                    peers=options.peers,
                    model=options.model,
                    requests=file,
                    kv_tokens=options.kv_tokens,
                    logs=options.logs,
                )
            except PeerError as error:
                _left_out(records, {"round": 0, "system": name}, error, console)
                continue
            stack.enter_context(peer)
            runs[name] = lambda peer=peer: _run_peer(peer, options.peer_timeout_s)
        for mode in options.mode:
            ours = ReferenceStack(options.model, mode, options.kv_tokens)
            console.print(f"starting {ours.name} ...", highlight=False)
            stack.enter_context(ours)
            runs[ours.name] = lambda ours=ours: run_ours(ours, requests)
        for number in range(options.rounds):
            for name, run in list(runs.items()):
                row: Row = {"round": number, "system": name}
                try:
                    seconds, tokens, ttfts_s = run()
                except PeerError as error:
                    del runs[name]
                    _left_out(records, row, error, console)
                    continue
                if tokens != output_tokens:
                    problem = f"{name}: {tokens} output tokens where {output_tokens} were due"
                    raise SystemExit(f"{problem}; --max-tokens needs a model by reference_model.py, kind llama")
                row |= {"seconds": seconds, "output_tokens": tokens}
                if ttfts_s:
                    row |= {f"ttft_p{p}_s": nearest_rank(ttfts_s, p) for p in (50, 99)}
                records.add(row)
                console.print(f"round {number} {name:<26} {tokens / seconds:7.1f} output tok/s", highlight=False)
    report(records.rows, console)


def _run_peer(peer: OfflinePeer, timeout_s: float) -> Ran:
    try:
        return peer.run(timeout_s)
    except PeerError:
        peer.close()
        raise


def _left_out(records: Records, row: Row, error: PeerError, console: Console) -> None:
    records.add(row | {"error": str(error)})
    console.print(f"{row['system']}: {error}; left out from now on", highlight=False)


def report(rows: list[Row], console: Console) -> None:
    """Prints medians, the ratio of each of our modes to each peer, and of best to best, round by round."""
    speeds: dict[str, dict[int, float]] = {}
    errors = {str(row["system"]): str(row["error"]) for row in rows if "error" in row}
    for row in rows:
        of_system = speeds.setdefault(str(row["system"]), {})
        if "error" not in row:
            of_system[int(row["round"])] = float(row["output_tokens"]) / float(row["seconds"])  # type: ignore[call-overload,arg-type]
    ours = [name for name in speeds if name.startswith(OURS)]
    peers = [name for name in speeds if name not in ours]
    table = Table(title="output tokens per second, all requests at once; ratios: median (min..max) over rounds")
    table.add_column("system")
    for column in ("median", "min..max", "TTFT p50, s", "TTFT p99, s", *(f"{name} / it" for name in ours)):
        table.add_column(column, justify="right")
    for name in [*ours, *peers]:
        values = list(speeds[name].values())
        median = f"{statistics.median(values):.1f}" if values else ""
        span = f"{min(values):.1f}..{max(values):.1f}" if values else ""
        ttfts_s = [
            [float(str(row[key])) for row in rows if row["system"] == name and key in row]
            for key in ("ttft_p50_s", "ttft_p99_s")
        ]
        medians = [f"{statistics.median(each):.2f}" if each else "" for each in ttfts_s]
        ratios = [] if name in ours else [ratio(speeds[mode], speeds[name]) for mode in ours]
        table.add_row(name, median, "; ".join(part for part in (span, errors.get(name, "")) if part), *medians, *ratios)
    console.print(table)
    best = [max((n for n in names if speeds[n]), key=lambda n: statistics.median(speeds[n].values()), default="")
            for names in (ours, peers)]  # fmt: skip
    if all(best):
        console.print(f"best against best: {best[0]} / {best[1]} = {ratio(speeds[best[0]], speeds[best[1]])}")


def ratio(ours: dict[int, float], theirs: dict[int, float]) -> str:
    """Returns median (min..max) of ours / theirs over the rounds that both finished; empty if there are none."""
    ratios = [ours[number] / theirs[number] for number in ours if number in theirs]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}..{max(ratios):.2f})" if ratios else ""


if __name__ == "__main__":
    main()
