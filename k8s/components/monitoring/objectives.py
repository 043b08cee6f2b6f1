"""The service level objectives, and the recording rules that measure them over the windows that alerts look at."""

from dataclasses import dataclass
from typing import Any

WINDOWS = ("5m", "30m", "1h", "2h", "6h", "1d", "3d")
# Windows whose bad calls are counted, too: an alert wants some number of them.
COUNTED = ("1h", "6h")
_ALL_CODES = "inkwell_gateway_requests_total"
_OURS = "UNAVAILABLE|INTERNAL|UNKNOWN|DATA_LOSS"
_READ = 'service="gateway", method=~".*OcrService/Recognize"'


@dataclass(frozen=True)
class Objective:
    """What share of which calls has to be good. all, bad: calls a second over a window {w}, by namespace."""

    name: str
    share: float
    all: str
    bad: str


OBJECTIVES = (
    # Calls that end for a fault of ours.
    Objective(
        "availability",
        0.999,
        f"sum by (namespace) (rate({_ALL_CODES}[{{w}}]))",
        f'(sum by (namespace) (rate({_ALL_CODES}{{{{code=~"{_OURS}"}}}}[{{w}}])) or {{all}} * 0)',
    ),
    # One line of handwriting within 2.5 s, at the gateway.
    Objective(
        "recognize-latency",
        0.95,
        f"sum by (namespace) (rate(inkwell_request_seconds_count{{{{{_READ}}}}}[{{w}}]))",
        f'({{all}} - sum by (namespace) (rate(inkwell_request_seconds_bucket{{{{{_READ}, le="2.5"}}}}[{{w}}])))',
    ),
    # The first step of a picture within 10 s of the call.
    Objective(
        "paint-latency",
        0.95,
        'sum by (namespace) (rate(inkwell_first_progress_seconds_count{{job="inkwell-diffusion"}}[{w}]))',
        "({all} - sum by (namespace)"
        ' (rate(inkwell_first_progress_seconds_bucket{{job="inkwell-diffusion", le="10.0"}}[{w}])))',
    ),
)


def objective_rules() -> dict[str, Any]:
    """The PrometheusRule of all objectives."""
    rules: list[dict[str, Any]] = []
    for objective in OBJECTIVES:
        labels = {"slo": objective.name}
        rules.append(
            {"record": "slo:inkwell_objective:ratio", "expr": f"vector({objective.share})", "labels": dict(labels)}
        )
        for window in WINDOWS:
            total = objective.all.format(w=window)
            bad = objective.bad.format(w=window, all=total)
            rules.append(
                {"record": f"slo:inkwell_errors:ratio_rate{window}", "expr": f"{bad} / {total}", "labels": dict(labels)}
            )
            if window in COUNTED:
                rules.append({"record": f"slo:inkwell_bad:rate{window}", "expr": bad, "labels": dict(labels)})
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "inkwell-slo"},
        "spec": {"groups": [{"name": "inkwell-slo", "interval": "30s", "rules": rules}]},
    }
