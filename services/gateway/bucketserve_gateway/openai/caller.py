"""Who asks, and with what promise: the headers of a request, in the one place where they are read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from bucketserve.v1 import common_pb2
from bucketserve_gateway.openai.errors import ParameterError

__all__ = ["Caller", "caller_of", "label_of", "metadata_of"]

TENANT = "x-llm-d-inference-fairness-id"
REQUEST_ID = "x-request-id"
TTFT = ("x-slo-ttft-ms", "x-llm-d-slo-ttft-ms", "x-dynamo-slo-ttft-ms", "x-sgl-ttft-slo-ms")
"""Names of one thing; the first one that is there counts."""
TPOT = ("x-slo-tpot-ms",)
UINT32 = 2**32 - 1
_MILLISECONDS = re.compile(r"[0-9]{1,10}")
_LABEL = re.compile(r"[\x21-\x7e]{1,128}")


class Caller(NamedTuple):
    """What the headers say."""

    metadata: Mapping[str, str]
    """As the native API's: for the trace context."""
    tenant: str
    """Empty for none."""
    label: str
    """x-request-id; empty for none."""
    slo: common_pb2.Slo


def caller_of(metadata: Mapping[str, str]) -> Caller:
    """Returns who asks, by the headers as metadata.

    Raises:
        ParameterError: a header has no sense.
    """
    label = metadata.get(REQUEST_ID, "")
    if label and not label_of(label):
        raise ParameterError(REQUEST_ID, "1 to 128 printable ASCII characters without spaces", "invalid_value")
    return Caller(
        metadata=metadata,
        tenant=metadata.get(TENANT, ""),
        label=label,
        slo=common_pb2.Slo(ttft_ms=_milliseconds(metadata, TTFT), tpot_ms=_milliseconds(metadata, TPOT)),
    )


def metadata_of(headers: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    """Returns headers as the native API has metadata; names are in small letters."""
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in headers}


def label_of(text: str) -> str:
    """Returns the text if the native API takes it as the label of a request; else nothing."""
    return text if _LABEL.fullmatch(text) else ""


def _milliseconds(metadata: Mapping[str, str], names: Iterable[str]) -> int | None:
    name = next((name for name in names if name in metadata), None)
    if name is None:
        return None
    text = metadata[name].strip()
    if not _MILLISECONDS.fullmatch(text) or not 1 <= int(text) <= UINT32:
        raise ParameterError(name, f"whole milliseconds, from 1 to {UINT32}", "invalid_value")
    return int(text)
