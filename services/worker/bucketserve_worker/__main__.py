"""`python -m bucketserve_worker`: one worker process, configured by environment and file."""

from __future__ import annotations

import sys

from bucketserve.starting import leave_on_signal, quieten_grpc

if __name__ == "__main__":
    # The imports below take seconds.
    leave_on_signal()
    quieten_grpc()

    from bucketserve.process import service_main
    from bucketserve_worker.app import serve
    from bucketserve_worker.settings import WorkerSettings

    sys.exit(service_main("worker", WorkerSettings, serve, lambda settings: settings.drain_s))
