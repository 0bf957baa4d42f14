"""Device models derived from data sheets, where nobody published measured coefficients.

Every coefficient of sim/latency.py follows from the device's arithmetic and memory bandwidth and the model's shape:

    per prompt token           2 x layer weights / (FLOP/s x efficiency)
    per squared prompt token   2 x layers x width / (FLOP/s x attention efficiency): causal, so half of the square
    fixed part of any step     bytes of the weights / (bytes/s x bandwidth efficiency) + launch time
    per context token          KV bytes of a token / (bytes/s x bandwidth efficiency)
    per decoding sequence      as a prompt token: the weights are read once, its arithmetic adds up

The sum of parts overstates a step that overlaps them and is the form that the measured models have as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["DERIVED", "H100_SXM", "LLAMA_3_1_8B", "Hardware", "Transformer", "roofline"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """One device by its data sheet, and which shares of it real kernels reach."""

    name: str
    source: str
    flop_per_s: float
    """Dense, 16-bit."""
    bytes_per_s: float
    memory_bytes: float
    link_bytes_per_s: float
    efficiency: float
    """Of arithmetic in the layers' matrix products."""
    attention_efficiency: float
    bandwidth_efficiency: float
    launch_s: float
    """Host and kernel launches per step, not hidden behind the device's work."""
    usable_share: float
    """Of memory; the rest is the framework's."""
    other_bytes: float
    """Activations and graphs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Transformer:
    """A decoder's shape; 16-bit weights and KV."""

    name: str
    source: str
    num_layers: int
    width: int
    kv_width: int
    """KV heads x head dimension."""
    layer_weights: float
    """Without embedding and output head: what every token is multiplied with."""
    all_weights: float
    context_tokens: int

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of one token's keys and values."""
        return 2 * 2 * self.num_layers * self.kv_width


H100_SXM = Hardware(
    name="h100-80gb",
    source="NVIDIA H100 SXM data sheet: 989 TFLOP/s dense BF16, 3.35 TB/s, 80 GB, NVLink 900 GB/s in both directions",
    flop_per_s=989e12,
    bytes_per_s=3.35e12,
    memory_bytes=80e9,
    link_bytes_per_s=450e9,
    efficiency=0.5,
    attention_efficiency=0.35,
    bandwidth_efficiency=0.8,
    launch_s=0.001,
    usable_share=0.9,
    other_bytes=2e9,
)
"""The efficiencies are assumed: half of dense peak in prefill, four fifths of bandwidth, a millisecond of launches.

With LLAMA_3_1_8B they give 30,000 prompt tokens/s at a length of 2,048, a lone decode step of 7 ms and room for 411,000
KV tokens. Ratios of policies hardly depend on them; absolute rates do.
"""

LLAMA_3_1_8B = Transformer(
    name="8b",
    source="meta-llama/Llama-3.1-8B config.json: 32 layers of 4,096, 8 KV heads of 128, 14,336 wide MLP, 128,256 words",
    num_layers=32,
    width=4096,
    kv_width=1024,
    layer_weights=6.98e9,
    all_weights=8.03e9,
    context_tokens=131_072,
)


def roofline(hardware: Hardware, model: Transformer) -> dict[str, object]:
    """Returns the model on one device as the content of a data file, which sim.latency.parse_device reads."""
    token_s = 2 * model.layer_weights / (hardware.flop_per_s * hardware.efficiency)
    square_s = 2 * model.num_layers * model.width / (hardware.flop_per_s * hardware.attention_efficiency)
    bytes_per_s = hardware.bytes_per_s * hardware.bandwidth_efficiency
    fixed_s = 2 * model.all_weights / bytes_per_s + hardware.launch_s
    return {
        "name": f"{hardware.name}-{model.name}",
        "source": f"derived (sim/roofline.py) from {hardware.source}; {model.source}",
        "context_tokens": model.context_tokens,
        "coefficients_unit": "s",
        "parallel": {
            "1": {
                "prefill": [fixed_s, token_s, square_s],
                "decode": [[0, fixed_s, model.kv_bytes_per_token / bytes_per_s, token_s]],
            }
        },
        "scale": {"prefill_fixed": 1.0, "prefill_variable": 1.0, "decode": 1.0},
        "memory": {
            "device_bytes": hardware.memory_bytes,
            "usable_share": hardware.usable_share,
            "weights_bytes": 2 * model.all_weights,
            "other_bytes_per_device": hardware.other_bytes,
            "kv_bytes_per_token": model.kv_bytes_per_token,
        },
        "kv_link": {"bytes_per_s": hardware.link_bytes_per_s, "latency_s": 0.0005},
    }


DERIVED: Mapping[str, Mapping[str, object]] = {str(data["name"]): data for data in (roofline(H100_SXM, LLAMA_3_1_8B),)}
"""By name, beside the packaged data files."""
