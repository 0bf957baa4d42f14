"""`python -m bucketserve_scheduler`: one scheduler process, configured by environment and file."""

from __future__ import annotations

import sys

from bucketserve.starting import leave_on_signal, quieten_grpc

if __name__ == "__main__":
    # The imports below take seconds.
    leave_on_signal()
    quieten_grpc()

    from bucketserve.process import service_main
    from bucketserve_scheduler.app import serve
    from bucketserve_scheduler.settings import SchedulerSettings

    sys.exit(service_main("scheduler", SchedulerSettings, serve, lambda _: 0.0))
