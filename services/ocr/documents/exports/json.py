"""JSON: one object with everything that the stream says, fields named as in the contract."""

import math
from typing import Any

import msgspec

from services.ocr.documents.result import LineResult, Origin, PageResult, Summary

MEDIA_TYPE = "application/json"


def head(origin: Origin) -> str:
    """The object up to its pages."""
    opening = _encoded({"model": origin.model, "created": origin.created, "inkwell_version": origin.version})
    return opening[:-1] + ',"pages":['


def page(result: PageResult, index: int) -> str:
    """One page; `index` counts from 0 within the file."""
    encoded = _encoded({**msgspec.structs.asdict(result.info), "lines": [_line(line) for line in result.lines]})
    return ("," if index else "") + encoded


def tail(summary: Summary) -> str:
    """The rest of the object."""
    return "]," + _encoded(msgspec.structs.asdict(summary))[1:] + "\n"


def _line(line: LineResult) -> dict[str, Any]:
    read = line.recognition
    return {
        "order": line.order,
        "block": line.block,
        "polygon": [{"x": round(x, 2), "y": round(y, 2)} for x, y in line.polygon],
        "angle": line.angle,
        "detection_score": line.detection_score,
        "text": line.text,
        "confidence": read.confidence,
        "confidence_calibrated": read.confidence_calibrated,
        "truncated": read.truncated,
        "repetition_suspected": read.repetition_suspected,
        "hypotheses": [
            {
                "text": hypothesis.text,
                "log_probability": hypothesis.log_probability,
                "score": hypothesis.score,
                "confidence": hypothesis.confidence,
                "tokens": [
                    {
                        "id": token.id,
                        "text": token.text,
                        "log_probability": token.log_probability,
                        "confidence": math.exp(token.log_probability),
                    }
                    for token in hypothesis.tokens
                ],
            }
            for hypothesis in read.hypotheses
        ],
    }


def _encoded(value: dict[str, Any]) -> str:
    return msgspec.json.encode(value).decode()
