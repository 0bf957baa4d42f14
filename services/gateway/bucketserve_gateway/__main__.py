"""`python -m bucketserve_gateway`: one gateway process, configured by environment and file."""

from __future__ import annotations

import sys

from bucketserve.starting import leave_on_signal, quieten_grpc

if __name__ == "__main__":
    # The imports below take seconds.
    leave_on_signal()
    quieten_grpc()
    # For tokenizers transformers does without torch, and imports it all the same where it is installed: 250 MiB.
    sys.modules["torch"] = None  # type: ignore[assignment]

    from bucketserve.process import service_main
    from bucketserve_gateway.app import serve
    from bucketserve_gateway.settings import GatewaySettings

    sys.exit(service_main("gateway", GatewaySettings, serve, lambda settings: settings.lame_duck_s + settings.drain_s))
