from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import Field

from bucketserve.config import Section, TelemetrySettings, load_settings, split_host_port
from bucketserve.core.errors import SettingsError


class Part(Section):
    port: int = Field(1, ge=1)
    url: str = "redis://host"


def load(environ=None, **more):
    return load_settings({"part": Part, "telemetry": TelemetrySettings}, environ=environ or {}, **more)


def test_precedence_is_flag_environment_file_default(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text("[part]\nport = 2\nurl = 'redis://file'\n[other]\nx = 1\n")
    loaded = load({"BUCKETSERVE_PART_PORT": "3"}, file=file)
    assert (loaded.sections["part"].port, loaded.sections["part"].url) == (3, "redis://file")
    loaded = load({"BUCKETSERVE_PART_PORT": "3"}, file=file, overrides={"part": {"port": 4, "url": None}})
    assert loaded.sections["part"].port == 4
    assert dict(loaded.sources) == {("part", "port"): "flag", ("part", "url"): "file"}


def test_every_problem_is_reported_at_once() -> None:
    with pytest.raises(SettingsError) as caught:
        load({"BUCKETSERVE_PART_PORT": "0", "BUCKETSERVE_PART_PROT": "3", "BUCKETSERVE_TELEMETRY_LOG_LEVEL": "loud"})
    problems = "\n".join(caught.value.problems)
    assert len(caught.value.problems) == 3
    assert "BUCKETSERVE_PART_PORT" in problems
    assert "BUCKETSERVE_PART_PROT: no such setting" in problems
    assert "BUCKETSERVE_TELEMETRY_LOG_LEVEL" in problems


def test_a_missing_file_and_a_broken_one_say_so(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="does not exist"):
        load({"BUCKETSERVE_CONFIG": str(tmp_path / "none.toml")})
    broken = tmp_path / "broken.toml"
    broken.write_text("[part")
    with pytest.raises(SettingsError, match="not TOML"):
        load(file=broken)


def test_passwords_are_masked() -> None:
    loaded = load({"BUCKETSERVE_PART_URL": "redis://me:secret@host:1"})
    shown = {field: value for section, field, value, _ in loaded.describe() if section == "part"}
    assert shown["url"] == "redis://me:***@host:1"


@pytest.mark.parametrize(
    ("text", "expected"), [("a:1", ("a", 1)), ("[::1]:50", ("::1", 50)), ("0.0.0.0:0", ("0.0.0.0", 0))]
)
def test_host_port(text: str, expected: tuple[str, int]) -> None:
    assert split_host_port(text) == expected


@pytest.mark.parametrize("text", ["a", "a:", "a:b", "a:70000", ""])
def test_not_host_port(text: str) -> None:
    with pytest.raises(ValueError, match="host:port"):
        split_host_port(text)
