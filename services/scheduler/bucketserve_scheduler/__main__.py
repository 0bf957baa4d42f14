"""`python -m bucketserve_scheduler`: one scheduler process, configured by environment and file."""

from __future__ import annotations

import sys

from bucketserve.process import service_main
from bucketserve_scheduler.app import serve
from bucketserve_scheduler.settings import SchedulerSettings

if __name__ == "__main__":
    sys.exit(service_main("scheduler", SchedulerSettings, serve))
