"""Writes docs/metrics.md from the catalogues of bucketserve.telemetry; --check fails if it is not current."""

from __future__ import annotations

import sys
from pathlib import Path

from bucketserve.telemetry.names import METRICS, Service
from bucketserve.telemetry.spans import ATTRIBUTES, SPANS

TARGET = Path(__file__).resolve().parents[1] / "docs" / "metrics.md"


def document() -> str:
    lines = [
        "# Metrics and traces",
        "",
        "Made from `bucketserve.telemetry` by `scripts/metrics_doc.py`; `make docs` writes it again.",
        "",
        "Each service answers Prometheus at `/metrics` on its `metrics_listen` address. No label carries an id.",
        "Beside what follows all of them export `process_*` (CPU seconds, resident memory, open files) and",
        "`process_asyncio_tasks`; with TLS also `process_tls_certificate_ends_seconds`, Unix time.",
    ]
    for service in Service:
        lines += ["", f"## {service.value}", "", "| metric | type | unit | labels | meaning |", "|---|---|---|---|---|"]
        for metric in METRICS.values():
            if metric.service is service:
                labels = ", ".join(f"`{label}`" for label in metric.labels) or "-"
                lines.append(f"| `{metric.name}` | {metric.kind.value} | {metric.unit} | {labels} | {metric.help} |")
    lines += ["", "## Spans", "", "| span | service | meaning |", "|---|---|---|"]
    lines += [f"| `{span.name}` | {span.service.value} | {span.help} |" for span in SPANS.values()]
    lines += ["", "## Span attributes", "", "| attribute | meaning |", "|---|---|"]
    lines += [f"| `{name}` | {meaning} |" for name, meaning in ATTRIBUTES.items()]
    return "\n".join(lines) + "\n"


def main() -> int:
    text = document()
    if "--check" not in sys.argv[1:]:
        TARGET.write_text(text, encoding="utf-8")
        return 0
    if TARGET.is_file() and TARGET.read_text(encoding="utf-8") == text:
        print("docs/metrics.md is current")
        return 0
    print("docs/metrics.md is not current: run `make docs`")
    return 1


if __name__ == "__main__":
    sys.exit(main())
