"""Every policy on random workloads.

The simulation itself raises when a rule of its world is broken: KV memory exceeded, a request dispatched twice or ended
twice, KV pulled that isn't there, or requests that wait for ever.
"""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from bucketserve.core.messages import DispatchBatch, PullKv
from bucketserve.sim.cluster import build_workers, parse_cluster
from bucketserve.sim.driver import Simulation
from bucketserve.sim.latency import CostMode, load_device
from bucketserve.sim.ledger import Outcome
from bucketserve.sim.policies import POLICIES, PolicyContext
from bucketserve.sim.slo import Slo
from bucketserve.sim.workload import Arrivals, Lengths, make_workload

DEVICE = load_device("a100-40gb-13b")
LAYOUTS = {name: ["3xboth", "1xboth"] for name in ("fcfs-static", "chunked", "uellm", "uellm-continuous")}
LAYOUTS |= {name: ["1xprefill+1xdecode", "2xprefill+2xdecode"] for name in ("distserve", "laps")}
LAYOUTS |= {name: ["2xboth", "1xprefill+1xdecode", "1xprefill+2xdecode"] for name in ("adaptive", "paper")}

lengths = st.builds(Lengths, st.integers(1, 6000), st.integers(1, 1500))


@given(
    st.sampled_from([(name, layout) for name, layouts in LAYOUTS.items() for layout in layouts]),
    st.lists(lengths, min_size=1, max_size=40),
    st.floats(0.5, 200),
    st.sampled_from(list(CostMode)),
    st.sampled_from([1.0, 1.7]),
    st.integers(0, 3),
)
@settings(max_examples=120)
def test_every_request_ends_once_and_no_rule_is_broken(
    which: tuple[str, str], rows: list[Lengths], rate: float, cost: CostMode, output_slack: float, seed: int
) -> None:
    name, layout = which
    policy = POLICIES[name]
    workload = make_workload(
        rows,
        num_requests=len(rows),
        rate_rps=rate,
        context_tokens=DEVICE.context_tokens,
        seed=seed,
        arrivals=Arrivals.GAMMA,
    )
    outputs = {f"r{i:07d}": request.output_tokens for i, request in enumerate(workload.requests)}
    built = policy.build(PolicyContext(DEVICE.context_tokens, seed, lambda request_id: outputs[request_id]))
    commands: list = []

    class Watched:
        def step(self, events, now_s):
            decision = built.step(events, now_s)
            commands.extend(decision.commands)
            return decision

    workers = build_workers(parse_cluster(layout), DEVICE, cost, policy.mode)
    ledger = Simulation(Watched(), workers, workload, DEVICE, Slo(output_slack=output_slack)).run()
    assert all(record.outcome is Outcome.FINISHED for record in ledger.records.values())
    assert len(ledger.records) == len(rows)
    batched = [request_id for c in commands if isinstance(c, DispatchBatch) for request_id in c.batch.request_ids]
    assert sorted(batched) == sorted(ledger.records)
    if "decode" in layout:
        moved = [command.request_id for command in commands if isinstance(command, PullKv)]
        assert len(moved) == len(set(moved)) == sum(request.output_tokens > 1 for request in workload.requests)
    for record in ledger.records.values():
        assert record.ttft_s is not None and record.end_s is not None
        # Nobody beats the device: a prompt takes at least its unloaded prefill, an output a step per further token.
        assert record.ttft_s >= DEVICE.latency[1].prefill_s(record.request.prompt_tokens) * 0.99
