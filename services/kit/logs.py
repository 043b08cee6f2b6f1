"""JSON log lines on standard error. No prompt, image or text is ever a log field."""

import logging
import sys
from datetime import UTC, datetime
from typing import Any

import msgspec
import structlog

# Methods that are not called like the level of their lines, as structlog has it.
_LEVELS = {"warn": "warning", "exception": "error"}


def configure(service: str, level: str) -> None:
    """Set up structlog and the standard library's logging to write one JSON object a line.

    level: "debug", "info", "warning" or "error".
    """
    number = logging.getLevelNamesMapping()[level.upper()]

    # What structlog has a processor for each, in one: there is a line for every call.
    def around(_logger: Any, method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        moment = datetime.now(UTC).replace(tzinfo=None).isoformat()
        return {
            "service": service,
            **structlog.contextvars.get_contextvars(),
            **event,
            "level": _LEVELS.get(method, method),
            "timestamp": f"{moment}Z",
        }

    shared: list[structlog.typing.Processor] = [around]
    structlog.configure(
        processors=[*shared, structlog.processors.dict_tracebacks, structlog.processors.JSONRenderer(_json)],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        # Bytes, and each line in one piece: several processes may write to the same file.
        logger_factory=structlog.BytesLoggerFactory(sys.stderr.buffer),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.dict_tracebacks,
                structlog.processors.JSONRenderer(),
            ],
        )
    )
    logging.basicConfig(handlers=[handler], level=max(number, logging.WARNING), force=True)


def _json(event: Any, default: Any) -> bytes:
    # There is a line for every call, and the standard library's encoder is a good part of what it costs.
    return msgspec.json.encode(event, enc_hook=default)
