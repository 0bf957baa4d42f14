"""Health probe for containers: `python -m bucketserve.probe HOST:PORT`, exit status 0 if SERVING.

It speaks as [tls] of its environment says: within a container that is the server's own.
"""

from __future__ import annotations

import os
import sys

import grpc

from bucketserve.addresses import AddressError
from bucketserve.config import TlsSettings, load_settings, section_of
from bucketserve.core.errors import SettingsError
from bucketserve.process import tls_of
from bucketserve.rpc.probe import check_health

__all__ = ["main"]


def main(arguments: list[str]) -> int:
    """Asks the server at arguments[0] for its overall health; prints the answer."""
    if len(arguments) != 1:
        print("usage: python -m bucketserve.probe HOST:PORT", file=sys.stderr)
        return 2
    try:
        settings = load_settings({"tls": TlsSettings}, environ=os.environ)
        health = check_health(arguments[0], tls=tls_of(section_of(settings, "tls", TlsSettings)))
    except grpc.RpcError as error:
        print(f"{arguments[0]}: {error.code().name}: {error.details()}", file=sys.stderr)
        return 1
    except (AddressError, SettingsError) as error:
        print(error, file=sys.stderr)
        return 2
    print(health)
    return 0 if health == "SERVING" else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
