"""Requests that arrive over time: BucketServe's whole stack beside vLLM's OpenAI server, in turn, in one run.

    benchmarks/peers/setup.sh DIR                      once; about 3 GB
    python benchmarks/reference_model.py MODEL         once
    python benchmarks/arrivals.py --peers DIR --model MODEL --requests FILE --capacity TOKENS_PER_S --jsonl OUT
    python benchmarks/arrivals.py --peers DIR --model MODEL --rate RATE --find 0.95 --jsonl OUT
    python benchmarks/arrivals.py --plot OUT IMAGE.png

Arrivals are Poisson, at --rate, or at --load (0.7) of --capacity: the output tokens per second that vLLM reaches when
all requests are there at once (benchmarks/compare.py). A round's arrivals are the same for every system, rounds differ.
Each client runs on the same cores as what it measures and streams: ours gRPC, vLLM's HTTP with server-sent events
(aiohttp). Whoever is not measured is stopped (SIGSTOP). Greedy, end tokens ignored, prompts are token ids, no prefix
cache on either side. A request is within its SLO when its first token came within --ttft-s (--long-ttft-s for prompts
of 256 tokens and more) and the others, on average, within --tpot-s; goodput counts such requests per second. With
--find each system is tried at --rate and at double or half of it, on and on, and then between the last rate at which
that share of requests was within SLO and the first at which it was not, until these are 10% apart; a rate has --rounds
rounds. --max-tokens and --kv-tokens: as in compare.py.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import tempfile
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import uvloop
from conditions import Records, Row, conditions, peer_versions, read_records
from peers.client import Outcome, open_loop
from peers.process import PeerError, VllmClient, VllmServer
from reference_requests import Request, read_requests
from reference_stack import MODES, OURS, ReferenceStack, end_on_signals, send
from rich.console import Console
from rich.table import Table

from bucketserve.client import BucketServeClient
from bucketserve.sim.percentiles import Percentiles
from bucketserve.v1 import common_pb2

SCALES = (0.5, 1.0, 2.0)
"""SLOs are counted at these multiples as well."""
CLOSE = 1.1
"""Ratio of the rates between which a search ends."""
SPAN = 16
"""Rates are looked for up to so many times the first one, and down to so many times less."""
Measured = tuple[list[Outcome], float]
"""What the clients felt, and seconds until the last end."""


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, help="where benchmarks/peers/setup.sh put vLLM")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--requests", type=Path, help="JSON with requests[] of prompt_ids and output_len; else drawn")
    parser.add_argument("--rate", type=float, help="requests per second")
    parser.add_argument("--capacity", type=float, help="in place of --rate: vLLM's output tokens per second")
    parser.add_argument("--load", type=float, default=0.7, help="share of --capacity")
    parser.add_argument("--find", type=float, metavar="SHARE", help="find the highest rate with so many within SLO")
    parser.add_argument("--every", type=int, default=1, help="take every n-th request only")
    parser.add_argument("--max-tokens", type=int, help="limit of every request, as far as the context goes")
    parser.add_argument("--kv-tokens", type=int, help="tokens of KV that each system has")
    parser.add_argument("--mode", choices=MODES, action="append", help="of ours; default: float32")
    parser.add_argument("--peer-dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--passes", type=int, default=1, help="how often a round goes through the requests")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--ttft-s", type=float, default=2.0, help="SLO of short prompts")
    parser.add_argument("--long-ttft-s", type=float, default=6.0, help="SLO of long prompts")
    parser.add_argument("--tpot-s", type=float, default=0.2)
    parser.add_argument("--round-timeout-s", type=float, default=1200.0)
    parser.add_argument("--jsonl", type=Path, help="where the raw figures go, as they come")
    parser.add_argument("--logs", type=Path, default=Path(tempfile.gettempdir()), help="folder for vLLM's logs")
    parser.add_argument("--plot", type=Path, nargs=2, metavar=("IN.jsonl", "OUT.png"), help="draw, measure nothing")
    options = parser.parse_args()
    if not options.plot:
        if not options.peers or not options.model:
            parser.error("--peers and --model are needed to measure")
        if (options.rate is None) == (options.capacity is None):
            parser.error("give either --rate or --capacity")
    return options


def main() -> None:
    """Measures and reports, or draws."""
    options = parse()
    end_on_signals()
    console = Console(width=140)
    if options.plot:
        source, image = options.plot
        draw(*read_records(source), image)
        return
    drawn = read_requests(options.requests)[:: options.every] * options.passes
    requests = [request.limited(options.max_tokens) for request in drawn]
    mean_tokens = statistics.fmean(request.output_tokens for request in requests)
    rate = options.rate or options.load * options.capacity / mean_tokens
    settings = {
        "rate": rate,
        "capacity": options.capacity,
        "load": options.load if options.capacity else None,
        "requests": len(requests),
        "rounds": options.rounds,
        "find": options.find,
        "max_tokens": options.max_tokens,
        "kv_tokens": options.kv_tokens,
        "seed": options.seed,
        "slo": {"ttft_s": options.ttft_s, "long_ttft_s": options.long_ttft_s, "tpot_s": options.tpot_s},
        "peer_versions": peer_versions(options.peers),
    }
    first = conditions(**settings)
    console.print(f"{len(requests)} requests at {rate:.2f} requests/s, {options.rounds} rounds", highlight=False)
    with ExitStack() as stack:
        records = stack.enter_context(Records(options.jsonl, first))
        runs = start(options, requests, stack, console)
        if options.find is not None:
            find(options, rate, requests, runs, records, console)
            return
        for number in range(options.rounds):
            at_s = arrival_times(len(requests), rate, options.seed + number)
            for name, run in runs.items():
                outcomes, seconds = run(at_s)
                failed = sum(1 for outcome in outcomes if outcome.error)
                for index, (request, outcome) in enumerate(zip(requests, outcomes, strict=True)):
                    row = request_row(request, outcome)
                    records.add({"round": number, "system": name, "request": index, "at_s": at_s[index], **row})
                records.add({"round": number, "system": name, "seconds": seconds})
                console.print(f"round {number} {name:<22} {seconds:6.1f} s, {failed} failed", highlight=False)
    report(first, records.rows, console)


@dataclass(slots=True)
class Search:
    """For the highest rate at which enough requests are within SLO."""

    first: float
    rate: float
    """To be tried next."""
    held: float | None = None
    failed: float | None = None

    @property
    def is_over(self) -> bool:
        """Whether the highest is known, or none fails or holds as far as is looked."""
        if self.held is None or self.failed is None:
            return not self.first / SPAN <= self.rate <= self.first * SPAN
        return self.failed / self.held <= CLOSE

    def note(self, is_enough: bool) -> None:
        """Takes what became of the rate."""
        if is_enough:
            self.held = self.rate
        else:
            self.failed = self.rate
        if self.held is None or self.failed is None:
            self.rate *= 2.0 if is_enough else 0.5
        else:
            self.rate = math.sqrt(self.held * self.failed)


def find(
    options: argparse.Namespace,
    rate: float,
    requests: list[Request],
    runs: dict[str, Callable[[list[float]], Measured]],
    records: Records,
    console: Console,
) -> None:
    """Tries rates, the systems in turn; prints each and, at the end, what each system holds."""
    slo = {"ttft_s": options.ttft_s, "long_ttft_s": options.long_ttft_s, "tpot_s": options.tpot_s}
    searches = {name: Search(rate, rate) for name in runs}
    while going := {name: search for name, search in searches.items() if not search.is_over}:
        for name, search in going.items():
            rows: list[Row] = []
            seconds = 0.0
            for number in range(options.rounds):
                outcomes, took_s = runs[name](arrival_times(len(requests), search.rate, options.seed + number))
                rows += [request_row(request, outcome) for request, outcome in zip(requests, outcomes, strict=True)]
                seconds += took_s
            found = figures(rows, seconds, slo)
            records.add({"system": name, "rate": search.rate, "seconds": seconds, **found})
            p50_s, p99_s = (found.get(f"ttft short {p}", math.nan) for p in ("p50", "p99"))
            short = f"TTFT p50, p99 of short prompts {p50_s:.2f}, {p99_s:.2f} s"
            console.print(f"{name:<22} {search.rate:.3f}/s: {found['within 1x']:.1%}, {short}", highlight=False)
            search.note(found["within 1x"] >= options.find)
    table = Table("system", "requests/s", title=f"highest rate with {options.find:.0%} within SLO")
    for name, search in searches.items():
        held = "none" if search.held is None else f"{search.held:.3f}"
        table.add_row(name, held if search.failed is not None else f"at least {held}")
    console.print(table)


def arrival_times(number: int, rate: float, seed: int) -> list[float]:
    """Returns when each request arrives, in seconds from the start."""
    rng = random.Random(seed)
    now_s, times = 0.0, []
    for _ in range(number):
        now_s += rng.expovariate(rate)
        times.append(now_s)
    return times


def start(
    options: argparse.Namespace, requests: list[Request], stack: ExitStack, console: Console
) -> dict[str, Callable[[list[float]], Measured]]:
    """Loads everybody; returns what runs a round of each."""
    runs: dict[str, Callable[[list[float]], Measured]] = {}
    console.print("loading vLLM's server ...")
    server = stack.enter_context(
        VllmServer(
            options.peer_dtype,
            peers=options.peers,
            model=options.model,
            kv_tokens=options.kv_tokens,
            logs=options.logs,
        )
    )
    client = stack.enter_context(VllmClient(server, peers=options.peers, logs=options.logs))

    def run_vllm(at_s: list[float]) -> Measured:
        plan = [{"at_s": at, **request.asked()} for at, request in zip(at_s, requests, strict=True)]
        server.go()
        # As ours: it answers a few requests before it is measured.
        warm = [{"at_s": 0.0, **Request(list(range(100, 164)), 4).asked()}] * 8
        client.run(warm, options.round_timeout_s)
        answer = client.run(plan, options.round_timeout_s)
        server.halt()
        return [Outcome(**outcome) for outcome in answer["outcomes"]], answer["seconds"]

    server.halt()
    runs[server.name] = run_vllm
    for mode in options.mode or ["float32"]:
        ours = ReferenceStack(options.model, mode, options.kv_tokens)
        console.print(f"starting {ours.name} ...", highlight=False)
        stack.enter_context(ours)
        runs[ours.name] = lambda at_s, ours=ours: run_ours(ours, requests, at_s, options)
    return runs


def run_ours(ours: ReferenceStack, requests: list[Request], at_s: list[float], options: argparse.Namespace) -> Measured:
    """Runs a round through the gateway; requests say what their SLO is."""
    ttft_s = {"short": options.ttft_s, "long": options.long_ttft_s}

    async def run() -> Measured:
        async with BucketServeClient(ours.address) as client:

            async def one(index: int) -> Outcome:
                request = requests[index]
                slo = common_pb2.Slo(
                    ttft_ms=round(ttft_s[request.kind] * 1e3), tpot_ms=max(round(options.tpot_s * 1e3), 1)
                )
                return await send(client, request, slo=slo, timeout_s=options.round_timeout_s)

            return await open_loop(at_s, one)

    ours.go()
    try:
        return uvloop.run(run())
    finally:
        ours.halt()


def request_row(request: Request, outcome: Outcome) -> Row:
    """Returns what is kept of a request."""
    row: Row = {"kind": request.kind, "prompt_tokens": len(request.prompt_ids), "sent_s": outcome.sent_s}
    row |= {"output_tokens": outcome.output_tokens, "ttft_s": None, "tpot_s": None, "error": outcome.error}
    if outcome.first_s is not None and outcome.last_s is not None:
        row["ttft_s"] = outcome.first_s - outcome.sent_s
        if outcome.output_tokens > 1:
            row["tpot_s"] = (outcome.last_s - outcome.first_s) / (outcome.output_tokens - 1)
    return row


def is_within(row: Row, slo: dict[str, float], scale: float) -> bool:
    """Whether a request was within its SLO, scaled."""
    if row["error"] or row["ttft_s"] is None:
        return False
    ttft_s = slo["long_ttft_s" if row["kind"] == "long" else "ttft_s"]
    return float(row["ttft_s"]) <= scale * ttft_s and float(row["tpot_s"] or 0.0) <= scale * slo["tpot_s"]  # type: ignore[arg-type]


def figures(rows: list[Row], seconds: float, slo: dict[str, float]) -> dict[str, float]:
    """Returns the figures of a system, of one round or of several together."""
    found: dict[str, float] = {}
    good = [row for row in rows if not row["error"]]
    for name, values in (
        ("ttft short", [row["ttft_s"] for row in good if row["kind"] == "short"]),
        ("ttft long", [row["ttft_s"] for row in good if row["kind"] == "long"]),
        ("tpot", [row["tpot_s"] for row in good if row["tpot_s"] is not None]),
    ):
        if values:
            of_all = Percentiles.of([float(value) for value in values])  # type: ignore[arg-type]
            found |= {f"{name} mean": of_all.mean, f"{name} p50": of_all.p50, f"{name} p99": of_all.p99}
    found["output tok/s"] = sum(int(row["output_tokens"]) for row in good) / seconds  # type: ignore[call-overload]
    for scale in SCALES:
        within = sum(is_within(row, slo, scale) for row in rows)
        found[f"within {scale:g}x"] = within / len(rows)
        found[f"goodput {scale:g}x"] = within / seconds
    return found


def report(first: Row, rows: list[Row], console: Console) -> None:
    """Prints the figures of all rounds together, and the ratios round by round."""
    slo: dict[str, float] = first["slo"]  # type: ignore[assignment]
    seconds = {(str(row["system"]), row["round"]): float(row["seconds"]) for row in rows if "seconds" in row}  # type: ignore[arg-type]
    felt = [row for row in rows if "seconds" not in row]
    systems = list(dict.fromkeys(name for name, _ in seconds))
    rounds = sorted({number for _, number in seconds})  # type: ignore[type-var]

    def of(system: str, numbers: Iterable[object]) -> dict[str, float]:
        numbers = list(numbers)
        mine = [row for row in felt if row["system"] == system and row["round"] in numbers]
        return figures(mine, sum(seconds[system, number] for number in numbers), slo)

    whole = {system: of(system, rounds) for system in systems}
    table = Table(
        title=f"{first['requests']} requests at {first['rate']:.2f} requests/s, {len(rounds)} rounds together; "
        f"SLO: TTFT {slo['ttft_s']:g} s (long prompts {slo['long_ttft_s']:g} s), TPOT {slo['tpot_s']:g} s"
    )
    table.add_column("")
    for system in systems:
        table.add_column(system, justify="right")
    theirs = [system for system in systems if not system.startswith(OURS)]
    ours = [system for system in systems if system.startswith(OURS)]
    pairs = [(mine, other) for mine in ours for other in theirs]
    for mine, other in pairs:
        table.add_column(f"{mine} / {other}, by round", justify="right")
    by_round = {(system, number): of(system, [number]) for system in systems for number in rounds}
    for name in dict.fromkeys(name for system in systems for name in whole[system]):
        cells = [_shown(name, whole[system].get(name)) for system in systems]
        for mine, other in pairs:
            ratios = [
                by_round[mine, number][name] / by_round[other, number][name]
                for number in rounds
                if by_round[mine, number].get(name) is not None and by_round[other, number].get(name)
            ]
            cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f}..{max(ratios):.2f})" if ratios else "")
        table.add_row(_label(name), *cells)
    console.print(table)
    if failed := sum(bool(row["error"]) for row in felt):
        console.print(f"{failed} requests failed; they count as outside of their SLO")


def _label(name: str) -> str:
    if name.startswith("t"):
        return f"{name.replace('ttft', 'TTFT').replace('tpot', 'TPOT')}, ms"
    return f"{name} SLO, requests/s" if name.startswith("goodput") else name


def _shown(name: str, value: float | None) -> str:
    if value is None:
        return ""
    if name.startswith("t"):
        return f"{value * 1e3:,.0f}"
    return f"{value:.1%}" if name.startswith("within") else f"{value:.2f}"


def draw(first: Row, rows: list[Row], image: Path) -> None:
    """Draws how TTFT of short prompts is distributed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.6))
    felt = [row for row in rows if "seconds" not in row and row["kind"] == "short"]
    for system in dict.fromkeys(str(row["system"]) for row in felt):
        mine = [row for row in felt if row["system"] == system]
        # What failed never came: the curve ends below 1.
        values = sorted(float(row["ttft_s"]) for row in mine if not row["error"])  # type: ignore[arg-type]
        shares = [(index + 1) / len(mine) for index in range(len(values))]
        axes.step(values, shares, where="post", label=system)
    slo: dict[str, float] = first["slo"]  # type: ignore[assignment]
    axes.axvline(slo["ttft_s"], color="grey", linewidth=0.8, linestyle=":", label="SLO")
    axes.set_xscale("log")
    axes.set(
        xlabel="time to first token, s",
        ylabel="share of short prompts",
        ylim=(0, 1.02),
        title=f"short prompts, {first['rate']:.2f} requests/s arriving",
    )
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(image, dpi=120)


if __name__ == "__main__":
    try:
        main()
    except PeerError as error:
        raise SystemExit(f"error: {error}") from error
