"""One JSON line per request on standard error: who, what, how long, how it ended. Never what was asked or answered."""

import json
import logging
import sys
import time
from typing import Any

ACCESS = "altiplano.access"
FIELDS = "altiplano_fields"


class JsonFormatter(logging.Formatter):
    """A record as one line of JSON: `time` (UTC), `level`, `logger`, `message`, and the fields of the record."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, FIELDS, {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def write_json_lines() -> None:
    """Send everything under the logger `altiplano` to standard error as JSON lines. For the process that serves."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    logger = logging.getLogger("altiplano")
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO)


def log_request(fields: dict[str, Any]) -> None:
    """One line for one HTTP request; server errors are errors."""
    level = logging.ERROR if fields.get("status", 0) >= 500 else logging.INFO
    logging.getLogger(ACCESS).log(level, "%s %s", fields.get("method"), fields.get("route"), extra={FIELDS: fields})
