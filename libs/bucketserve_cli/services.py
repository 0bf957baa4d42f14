"""One service at a time in the foreground, and the settings that it would have."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from bucketserve.config import Section, TelemetrySettings, TlsSettings, load_settings
from bucketserve.core.errors import SettingsError
from bucketserve_cli.terminal import InputError, console, plain_table

__all__ = ["config_app", "gateway", "scheduler", "worker"]

config_app = typer.Typer(help="Settings.")

SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="a setting, NAME=VALUE or telemetry.NAME=VALUE; may be repeated")
]
ConfigOption = Annotated[Path | None, typer.Option(help="TOML file with settings")]


def _service(module: str, assignments: list[str], config: Path | None) -> None:
    section = module.removeprefix("bucketserve_")
    environ = dict(os.environ)
    if config is not None:
        environ["BUCKETSERVE_CONFIG"] = str(config)
    for assignment in assignments:
        name, separator, value = assignment.partition("=")
        if not separator:
            raise InputError(f"--set {assignment}: write --set NAME=VALUE")
        group, dot, field = name.rpartition(".")
        environ[f"BUCKETSERVE_{(group if dot else section).upper()}_{field.upper()}"] = value
    # The service replaces this process: signals, standard streams and exit status are its own.
    os.execve(sys.executable, [sys.executable, "-m", module], environ)


def gateway(settings: SetOption = None, config: ConfigOption = None) -> None:
    """Run one gateway in the foreground."""
    _service("bucketserve_gateway", settings or [], config)


def scheduler(settings: SetOption = None, config: ConfigOption = None) -> None:
    """Run one scheduler in the foreground."""
    _service("bucketserve_scheduler", settings or [], config)


def worker(settings: SetOption = None, config: ConfigOption = None) -> None:
    """Run one worker in the foreground."""
    _service("bucketserve_worker", settings or [], config)


@config_app.command("show")
def config_show(config: ConfigOption = None) -> None:
    """Show every setting in force and where it comes from."""
    from bucketserve_gateway.settings import GatewaySettings
    from bucketserve_scheduler.settings import SchedulerSettings
    from bucketserve_worker.settings import WorkerSettings

    sections: dict[str, type[Section]] = {
        "gateway": GatewaySettings,
        "scheduler": SchedulerSettings,
        "worker": WorkerSettings,
        "tls": TlsSettings,
        "telemetry": TelemetrySettings,
    }
    try:
        loaded = load_settings(sections, environ=os.environ, file=config)
    except SettingsError as error:
        raise InputError("; ".join(error.problems)) from None
    table = plain_table("section", "setting", "value", "from", "meaning")
    for section, field, value, source in loaded.describe():
        meaning = sections[section].model_fields[field].description or ""
        table.add_row(
            section, field, escape(value), source, escape(meaning), style="" if source == "default" else "bold"
        )
    console.print(table)
