"""Structured logs: one event per line, a stable name, ids and numbers as fields. Prompts are never logged."""

from __future__ import annotations

import json
import logging
import sys
import time
from datetime import UTC, datetime
from typing import Literal

__all__ = ["EventLog", "Repeated", "open_log"]

Field = str | int | float | bool | None


class EventLog:
    """Writes events of one service."""

    def __init__(self, logger: logging.Logger) -> None:
        """Wraps a logger that open_log set up."""
        self._logger = logger

    def debug(self, event: str, **fields: Field) -> None:
        """Of interest while debugging."""
        self._write(logging.DEBUG, event, fields)

    def info(self, event: str, **fields: Field) -> None:
        """Part of normal life."""
        self._write(logging.INFO, event, fields)

    def warning(self, event: str, **fields: Field) -> None:
        """Something is wrong outside; the service copes."""
        self._write(logging.WARNING, event, fields)

    def error(self, event: str, error: BaseException | None = None, **fields: Field) -> None:
        """Something is wrong here; the traceback, if there is one, is part of the event."""
        self._write(logging.ERROR, event, fields, error)

    def _write(self, level: int, event: str, fields: dict[str, Field], error: BaseException | None = None) -> None:
        if self._logger.isEnabledFor(level):
            self._logger.log(level, event, extra={"fields": fields}, exc_info=error)


class Repeated:
    """Whether to say something again that is tried again and again: at once when it changes, else ever more rarely."""

    FIRST_S, MOST_S = 1.0, 60.0

    def __init__(self) -> None:
        """Nothing has been said."""
        self._text: str | None = None
        self._next_s = self._pause_s = 0.0

    def is_due(self, text: str) -> bool:
        """Whether to say it now; it counts as said then."""
        now_s = time.monotonic()
        if text == self._text and now_s < self._next_s:
            return False
        self._pause_s = self.FIRST_S if text != self._text else min(2 * self._pause_s, self.MOST_S)
        self._text, self._next_s = text, now_s + self._pause_s
        return True

    def is_over(self) -> bool:
        """Whether there was something to say until now; forgets it."""
        was_said, self._text = self._text is not None, None
        return was_said


def open_log(
    service: str, instance_id: str, *, level: str = "info", style: Literal["auto", "json", "text"] = "auto"
) -> EventLog:
    """Returns the service's log on standard error; libraries' warnings go there too, in the same form."""
    handler = logging.StreamHandler(sys.stderr)
    is_text = style == "text" or (style == "auto" and sys.stderr.isatty())
    handler.setFormatter(_TextFormatter() if is_text else _JsonFormatter(service, instance_id))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logger = logging.getLogger(f"bucketserve.{service}")
    logger.setLevel(level.upper())
    return EventLog(logger)


class _JsonFormatter(logging.Formatter):
    def __init__(self, service: str, instance_id: str) -> None:
        super().__init__()
        self._service, self._instance_id = service, instance_id

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Field] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "service": self._service,
            "instance": self._instance_id,
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


class _TextFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields = " ".join(f"{name}={value}" for name, value in getattr(record, "fields", {}).items())
        text = f"{self.formatTime(record, '%H:%M:%S')} {record.levelname.lower():<7} {record.getMessage()} {fields}"
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text
