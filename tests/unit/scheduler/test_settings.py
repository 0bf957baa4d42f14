"""Settings of the scheduler that only make sense together."""

from __future__ import annotations

import pytest

from bucketserve.config import load_settings
from bucketserve.core.errors import SettingsError
from bucketserve_scheduler.settings import SchedulerSettings


def load(**values: str) -> SchedulerSettings:
    environ = {f"BUCKETSERVE_SCHEDULER_{name.upper()}": value for name, value in values.items()}
    found = load_settings({"scheduler": SchedulerSettings}, environ=environ).sections["scheduler"]
    assert isinstance(found, SchedulerSettings)
    return found


@pytest.mark.parametrize(
    "values",
    [{"report_interval_s": "6"}, {"report_interval_s": "1.7"}, {"worker_lease_s": "1"}],
    ids=str,
)
def test_a_lease_that_reports_do_not_renew_in_time_is_refused(values: dict[str, str]) -> None:
    with pytest.raises(SettingsError) as refused:
        load(**values)
    (problem,) = refused.value.problems
    assert "only reports renew worker_lease_s" in problem
    assert "report_interval_s" in problem.lower()


@pytest.mark.parametrize(
    ("lease", "interval"), [("5", "0.5"), ("18", "6"), ("180", "60"), ("0.6", "0.2"), ("1.5", "0.5")]
)
def test_a_lease_of_three_reports_is_taken(lease: str, interval: str) -> None:
    assert load(worker_lease_s=lease, report_interval_s=interval).worker_lease_s == float(lease)


def test_of_a_lease_that_is_wrong_by_itself_only_that_is_said() -> None:
    with pytest.raises(SettingsError) as refused:
        load(worker_lease_s="400", report_interval_s="6")
    (problem,) = refused.value.problems
    assert "WORKER_LEASE_S" in problem
