"""`python -m bucketserve_gateway`: one gateway process, configured by environment and file."""

from __future__ import annotations

import sys

from bucketserve.process import service_main
from bucketserve_gateway.app import serve
from bucketserve_gateway.settings import GatewaySettings

if __name__ == "__main__":
    sys.exit(service_main("gateway", GatewaySettings, serve))
