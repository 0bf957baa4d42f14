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
from bucketserve.sim.limits import OutputLimits
from bucketserve.sim.policies import POLICIES, with_settings
from bucketserve.sim.policy_spec import PolicyContext, apart, either, together
from bucketserve.sim.slo import Slo
from bucketserve.sim.workload import BLOCK_TOKENS, Arrivals, Lengths, make_workload

DEVICE = load_device("a100-40gb-13b")
LAYOUTS = {name: ["3xboth", "1xboth"] for name, spec in POLICIES.items() if spec.layouts is together}
LAYOUTS |= {name: ["1xprefill+1xdecode", "2xprefill+2xdecode"] for name, p in POLICIES.items() if p.layouts is apart}
LAYOUTS |= {
    name: ["2xboth", "1xprefill+1xdecode", "1xprefill+2xdecode"] for name, p in POLICIES.items() if p.layouts is either
}

SWITCHING = "adaptive, roles switch"
LAYOUTS[SWITCHING] = ["1xprefill+2xdecode", "3xprefill+1xdecode"]

# Prompts share their first blocks: a chain is named by its root.
chains = st.builds(
    lambda root, number: tuple(10 * root + i for i in range(number)), st.integers(0, 2), st.integers(0, 8)
)
lengths = st.builds(Lengths, st.integers(1, 6000), st.integers(1, 1500), st.none(), chains)


@given(
    st.sampled_from([(name, layout) for name, layouts in LAYOUTS.items() for layout in layouts]),
    st.lists(lengths, min_size=1, max_size=40),
    st.floats(0.5, 200),
    st.sampled_from(list(CostMode)),
    st.sampled_from(list(OutputLimits)),
    st.sampled_from([0.0, 0.3]),
    st.integers(0, 3),
)
@settings(max_examples=120)
def test_every_request_ends_once_and_no_rule_is_broken(
    which: tuple[str, str],
    rows: list[Lengths],
    rate: float,
    cost: CostMode,
    limits: OutputLimits,
    batch_share: float,
    seed: int,
) -> None:
    name, layout = which
    policy = with_settings(POLICIES["adaptive"], {"switch_roles": "true"}) if name == SWITCHING else POLICIES[name]
    workload = make_workload(
        rows,
        num_requests=len(rows),
        rate_rps=rate,
        context_tokens=DEVICE.context_tokens,
        seed=seed,
        arrivals=Arrivals.GAMMA,
        limits=limits,
        batch_share=batch_share,
    )
    drawn = {f"r{i:07d}": request for i, request in enumerate(workload.requests)}
    built = policy.build(PolicyContext(DEVICE.context_tokens, seed, lambda request_id: drawn[request_id]))
    commands: list = []

    class Watched:
        def step(self, events, now_s):
            decision = built.step(events, now_s)
            commands.extend(decision.commands)
            return decision

    workers = build_workers(parse_cluster(layout), DEVICE, cost, policy.mode)
    ledger = Simulation(Watched(), workers, workload, DEVICE, Slo()).run()
    assert all(record.outcome is Outcome.FINISHED for record in ledger.records.values())
    assert len(ledger.records) == len(rows)
    batched = [request_id for c in commands if isinstance(c, DispatchBatch) for request_id in c.batch.request_ids]
    # Each attempt once; a request that its worker let go is another attempt, twice at most.
    assert len(batched) == len(set(batched))
    last = {request_id.partition(".")[0]: request_id for request_id in ledger.records}
    assert {request_id.partition(".")[0] for request_id in batched} == last.keys()
    assert set(last.values()) <= set(batched)
    moved = [command.request_id for command in commands if isinstance(command, PullKv)]
    assert len(moved) == len(set(moved))
    if "decode" in layout and len(batched) == len(rows):
        assert len(moved) == sum(request.output_tokens > 1 for request in workload.requests)
    for record in ledger.records.values():
        assert record.ttft_s is not None and record.end_s is not None
        # Nobody beats the device: a prompt takes at least the unloaded prefill of what no prefix cache may have of it.
        computed = max(record.request.prompt_tokens - BLOCK_TOKENS * len(record.request.block_hashes), 1)
        assert record.ttft_s >= DEVICE.latency[1].prefill_s(computed) * 0.99
