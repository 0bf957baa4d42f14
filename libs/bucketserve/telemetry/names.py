"""The catalogue of metrics, and who exports what. docs/metrics.md is made from it, and from spans.py.

Metrics with the prefix vllm: have the names that autoscalers and dashboards for vLLM already read.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

__all__ = ["METRICS", "Kind", "Metric", "Service"]


class Kind(enum.Enum):
    """Type of a metric."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


class Service(enum.Enum):
    """Who exports it."""

    GATEWAY = "gateway"
    SCHEDULER = "scheduler"
    WORKER = "worker"


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One metric."""

    name: str
    kind: Kind
    service: Service
    unit: str
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


TTFT_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
TPOT_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
LATENCY_S = (0.0001, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
SIZES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0)
SHARES = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)

G, S, W = Service.GATEWAY, Service.SCHEDULER, Service.WORKER

METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(
            name="bucketserve_gateway_job_requests_total",
            kind=Kind.COUNTER,
            service=G,
            unit="requests",
            help="Requests of batch jobs that ended here: completed, failed or superseded by another runner.",
            labels=("outcome",),
        ),
        Metric(
            name="bucketserve_gateway_requests_total",
            kind=Kind.COUNTER,
            service=G,
            unit="requests",
            help="Requests that ended, by outcome.",
            labels=("model", "request_class", "outcome"),
        ),
        Metric(
            name="bucketserve_gateway_open_calls",
            kind=Kind.GAUGE,
            service=G,
            unit="calls",
            help="Calls of clients that are open, health checks aside.",
        ),
        Metric(
            name="bucketserve_gateway_held_bytes",
            kind=Kind.GAUGE,
            service=G,
            unit="bytes",
            help="What open requests hold: prompts, and answers that are collected.",
        ),
        Metric(
            name="bucketserve_gateway_refused_total",
            kind=Kind.COUNTER,
            service=G,
            unit="calls",
            help="Calls refused for what the gateway itself has open: max_calls, max_calls_per_connection, "
            "max_held_bytes, tokenizer_busy or slow_request; or for their key: unauthenticated or forbidden.",
            labels=("reason",),
        ),
        Metric(
            name="bucketserve_gateway_open_requests",
            kind=Kind.GAUGE,
            service=G,
            unit="requests",
            help="Requests whose stream is open.",
        ),
        Metric(
            name="bucketserve_gateway_ttft_seconds",
            kind=Kind.HISTOGRAM,
            service=G,
            unit="seconds",
            help="Time from arrival to the first token leaving.",
            labels=("model", "request_class"),
            buckets=TTFT_S,
        ),
        Metric(
            name="bucketserve_gateway_tpot_seconds",
            kind=Kind.HISTOGRAM,
            service=G,
            unit="seconds",
            help="Mean time per output token after the first, per request.",
            labels=("model", "request_class"),
            buckets=TPOT_S,
        ),
        Metric(
            name="bucketserve_gateway_queue_seconds",
            kind=Kind.HISTOGRAM,
            service=G,
            unit="seconds",
            help="Time from arrival to dispatch.",
            labels=("model", "request_class"),
            buckets=LATENCY_S,
        ),
        Metric(
            name="bucketserve_gateway_prompt_tokens_total",
            kind=Kind.COUNTER,
            service=G,
            unit="tokens",
            help="Prompt tokens of accepted requests.",
            labels=("model",),
        ),
        Metric(
            name="bucketserve_gateway_output_tokens_total",
            kind=Kind.COUNTER,
            service=G,
            unit="tokens",
            help="Tokens delivered to clients.",
            labels=("model",),
        ),
        Metric(
            name="bucketserve_gateway_resumptions_total",
            kind=Kind.COUNTER,
            service=G,
            unit="requests",
            help="Requests started again, by cause: lost, with a worker that was lost or failed, or preempted.",
            labels=("model", "cause"),
        ),
        Metric(
            name="bucketserve_scheduler_faults_total",
            kind=Kind.COUNTER,
            service=S,
            unit="events",
            help="Events that the core failed on; the requests that they named were given up.",
            labels=(),
        ),
        Metric(
            name="bucketserve_scheduler_waiting_requests",
            kind=Kind.GAUGE,
            service=S,
            unit="requests",
            help="Requests in the queue.",
            labels=("model",),
        ),
        Metric(
            name="bucketserve_scheduler_deferred_requests",
            kind=Kind.GAUGE,
            service=S,
            unit="requests",
            help="Requests in the queue that are late or of class batch: they go after those in time.",
            labels=("model",),
        ),
        Metric(
            name="bucketserve_scheduler_padding_waste_ratio",
            kind=Kind.GAUGE,
            service=S,
            unit="ratio",
            help="Padding if batches were padded: predicted (to the bucket's edge) or observed (to the longest "
            "prompt), relative (per request) or tokens (share of padded tokens).",
            labels=("model", "source", "reading"),
        ),
        Metric(
            name="bucketserve_scheduler_waiting_tokens",
            kind=Kind.GAUGE,
            service=S,
            unit="tokens",
            help="Prompt tokens in the queue.",
            labels=("model",),
        ),
        Metric(
            name="bucketserve_scheduler_running_requests",
            kind=Kind.GAUGE,
            service=S,
            unit="requests",
            help="Requests at workers.",
            labels=("model",),
        ),
        Metric(
            name="bucketserve_scheduler_buckets",
            kind=Kind.GAUGE,
            service=S,
            unit="buckets",
            help="Length buckets.",
            labels=("model",),
        ),
        Metric(
            name="bucketserve_scheduler_admitted_total",
            kind=Kind.COUNTER,
            service=S,
            unit="requests",
            help="Requests queued.",
            labels=("model", "request_class"),
        ),
        Metric(
            name="bucketserve_scheduler_refused_total",
            kind=Kind.COUNTER,
            service=S,
            unit="requests",
            help="Requests not queued, by reason.",
            labels=("reason",),
        ),
        Metric(
            name="bucketserve_scheduler_dropped_total",
            kind=Kind.COUNTER,
            service=S,
            unit="requests",
            help="Queued or running requests that ended early, by reason.",
            labels=("reason",),
        ),
        Metric(
            name="bucketserve_scheduler_role_switches_total",
            kind=Kind.COUNTER,
            service=S,
            unit="switches",
            help="Workers given another role, by the new one.",
            labels=("role",),
        ),
        Metric(
            name="bucketserve_scheduler_batches_total",
            kind=Kind.COUNTER,
            service=S,
            unit="batches",
            help="Batches dispatched, by what limited their size.",
            labels=("limited_by",),
        ),
        Metric(
            name="bucketserve_scheduler_batch_requests",
            kind=Kind.HISTOGRAM,
            service=S,
            unit="requests",
            help="Requests per batch.",
            buckets=SIZES,
        ),
        Metric(
            name="bucketserve_scheduler_batch_padding_ratio",
            kind=Kind.HISTOGRAM,
            service=S,
            unit="ratio",
            help="Share of padding if the batch were padded to its longest prompt.",
            buckets=SHARES,
        ),
        Metric(
            name="bucketserve_scheduler_step_seconds",
            kind=Kind.HISTOGRAM,
            service=S,
            unit="seconds",
            help="Duration of core.step.",
            buckets=LATENCY_S,
        ),
        Metric(
            name="bucketserve_scheduler_store_seconds",
            kind=Kind.HISTOGRAM,
            service=S,
            unit="seconds",
            help="Duration of a store round trip.",
            buckets=LATENCY_S,
        ),
        Metric(
            name="bucketserve_scheduler_leading",
            kind=Kind.GAUGE,
            service=S,
            unit="boolean",
            help="1 while this scheduler leads the model.",
            labels=("model",),
        ),
        Metric(
            name="bucketserve_worker_steps_total",
            kind=Kind.COUNTER,
            service=W,
            unit="steps",
            help="Forward passes.",
            labels=("model",),
        ),
        Metric(
            name="bucketserve_worker_step_seconds",
            kind=Kind.HISTOGRAM,
            service=W,
            unit="seconds",
            help="Duration of a forward pass.",
            labels=("model",),
            buckets=LATENCY_S,
        ),
        Metric(
            name="bucketserve_worker_prefill_tokens_total",
            kind=Kind.COUNTER,
            service=W,
            unit="tokens",
            help="Prompt tokens computed.",
            labels=("model",),
        ),
        Metric(
            name="bucketserve_worker_decode_tokens_total",
            kind=Kind.COUNTER,
            service=W,
            unit="tokens",
            help="Tokens generated in decode.",
            labels=("model",),
        ),
        Metric(
            name="bucketserve_worker_kv_total_tokens",
            kind=Kind.GAUGE,
            service=W,
            unit="tokens",
            help="KV memory.",
            labels=("model",),
        ),
        Metric(
            name="bucketserve_worker_kv_free_tokens",
            kind=Kind.GAUGE,
            service=W,
            unit="tokens",
            help="KV memory that is neither used nor reserved.",
            labels=("model",),
        ),
        Metric(
            name="bucketserve_worker_kv_kept_tokens",
            kind=Kind.GAUGE,
            service=W,
            unit="tokens",
            help="Free KV memory that keeps what prompts may begin with, until it is wanted.",
            labels=("model",),
        ),
        Metric(
            name="bucketserve_worker_out_of_memory_total",
            kind=Kind.COUNTER,
            service=W,
            unit="events",
            help="Times the device ran out of memory.",
            labels=("model",),
        ),
        Metric(
            name="bucketserve_worker_finished_total",
            kind=Kind.COUNTER,
            service=W,
            unit="requests",
            help="Requests that left the worker, by reason.",
            labels=("model", "reason"),
        ),
        Metric(
            name="bucketserve_worker_preempted_total",
            kind=Kind.COUNTER,
            service=W,
            unit="requests",
            help="Requests let go before their end, by cause: memory, where KV had run out, or order, the scheduler's.",
            labels=("model", "cause"),
        ),
        Metric(
            name="bucketserve_worker_kv_held_tokens",
            kind=Kind.GAUGE,
            service=W,
            unit="tokens",
            help="KV of prefilled requests that wait for a decode worker.",
            labels=("model",),
        ),
        Metric(
            name="bucketserve_worker_kv_transfers_total",
            kind=Kind.COUNTER,
            service=W,
            unit="transfers",
            help="KV pulled from other workers, by transport: in_process, shared_memory, grpc or failed.",
            labels=("model", "transport"),
        ),
        Metric(
            name="bucketserve_worker_kv_transfer_bytes_total",
            kind=Kind.COUNTER,
            service=W,
            unit="bytes",
            help="KV pulled from other workers.",
            labels=("model",),
        ),
        Metric(
            name="bucketserve_worker_kv_transfer_known_pages_total",
            kind=Kind.COUNTER,
            service=W,
            unit="pages",
            help="Pages of pulled prompts that did not have to come, since their KV was here.",
            labels=("model",),
        ),
        Metric(
            name="bucketserve_worker_kv_transfer_seconds",
            kind=Kind.HISTOGRAM,
            service=W,
            unit="seconds",
            help="From the order to pull to the last verified byte.",
            labels=("model",),
            buckets=LATENCY_S,
        ),
        Metric(
            name="bucketserve_worker_kv_leases_expired_total",
            kind=Kind.COUNTER,
            service=W,
            unit="blocks",
            help="Held KV given up: no scheduler was heard of, or its engine keeps it no longer.",
            labels=("model",),
        ),
        Metric(
            name="vllm:num_requests_running",
            kind=Kind.GAUGE,
            service=W,
            unit="requests",
            help="Sequences in decode.",
            labels=("model_name",),
        ),
        Metric(
            name="vllm:num_requests_waiting",
            kind=Kind.GAUGE,
            service=W,
            unit="requests",
            help="Sequences whose prompt is not computed yet.",
            labels=("model_name",),
        ),
        Metric(
            name="vllm:kv_cache_usage_perc",
            kind=Kind.GAUGE,
            service=W,
            unit="ratio",
            help="Share of KV memory in use or reserved, 0 to 1.",
            labels=("model_name",),
        ),
        Metric(
            name="vllm:generation_tokens_total",
            kind=Kind.COUNTER,
            service=W,
            unit="tokens",
            help="Tokens generated.",
            labels=("model_name",),
        ),
        Metric(
            name="vllm:prefix_cache_queries_total",
            kind=Kind.COUNTER,
            service=W,
            unit="tokens",
            help="Prompt tokens looked up in the prefix cache.",
            labels=("model_name",),
        ),
        Metric(
            name="vllm:prefix_cache_hits_total",
            kind=Kind.COUNTER,
            service=W,
            unit="tokens",
            help="Prompt tokens whose KV was there already.",
            labels=("model_name",),
        ),
        Metric(
            name="vllm:prompt_tokens_total",
            kind=Kind.COUNTER,
            service=W,
            unit="tokens",
            help="Prompt tokens computed.",
            labels=("model_name",),
        ),
        Metric(
            name="vllm:request_success_total",
            kind=Kind.COUNTER,
            service=W,
            unit="requests",
            help="Requests that ended regularly.",
            labels=("model_name", "finished_reason"),
        ),
    )
}
