"""Graphs of a Grafana dashboard, and the PromQL that they are made of.

Every expression is of the chosen namespaces, and its legend is the values of the labels that it is added up by.
"""

from dataclasses import dataclass
from typing import Any

IN = 'namespace=~"$namespace"'
WIDTH, HEIGHT, ACROSS = 8, 8, 3
SOURCE = {"type": "prometheus", "uid": "${datasource}"}


@dataclass(frozen=True)
class Line:
    """One or more series of a graph. legend: in Grafana's form, "{{pool}}"."""

    expr: str
    legend: str


@dataclass(frozen=True)
class Panel:
    """A graph. unit: one of Grafana's, such as "s" or "bytes"."""

    title: str
    lines: tuple[Line, ...]
    unit: str
    about: str = ""


@dataclass(frozen=True)
class Dashboard:
    """name: of the file, and in the dashboard's uid. rows: graphs under a heading each."""

    name: str
    title: str
    rows: tuple[tuple[str, tuple[Panel, ...]], ...]


def panel(title: str, *lines: Line, unit: str = "short", about: str = "") -> Panel:
    """A graph of some lines."""
    return Panel(title, lines, unit, about)


def legend(by: str, prefix: str = "") -> str:
    """A legend of the labels, such as "waiting {{pool}}"."""
    return " ".join([*([prefix] if prefix else []), *("{{" + label.strip() + "}}" for label in by.split(",") if by)])


def rate(metric: str, matchers: str = "", by: str = "", prefix: str = "") -> Line:
    """A counter's rate a second, added up by labels."""
    return Line(_rate(metric, matchers, by), legend(by, prefix))


def busiest(metric: str, matchers: str, by: str) -> Line:
    """The same of the ten largest."""
    return Line(f"topk(10, {_rate(metric, matchers, by)})", legend(by))


def hourly(metric: str, matchers: str = "", by: str = "") -> Line:
    """How much a counter grew within the last hour."""
    return Line(f"sum by ({by}) (increase({metric}{{{_all(IN, matchers)}}}[1h]))", legend(by))


def quantiles(metric: str, matchers: str = "", by: str = "", high: float = 0.95) -> tuple[Line, Line]:
    """The median of a histogram, and a high quantile."""
    rates = _rate(f"{metric}_bucket", matchers, f"le, {by}" if by else "le")
    return (
        Line(f"histogram_quantile(0.5, {rates})", legend(by, "median")),
        Line(f"histogram_quantile({high}, {rates})", legend(by, f"{high:.0%}".replace("%", " %"))),
    )


def mean(metric: str, matchers: str, by: str) -> Line:
    """The mean of a histogram."""
    return Line(f"{_rate(f'{metric}_sum', matchers, by)} / {_rate(f'{metric}_count', matchers, by)}", legend(by))


def gauge(metric: str, matchers: str = "", by: str = "", prefix: str = "", how: str = "sum") -> Line:
    """A gauge, added up by labels (or their max, or count)."""
    return Line(f"{how} by ({by}) ({metric}{{{_all(IN, matchers)}}})", legend(by, prefix))


def each(metric: str, matchers: str = "", named: str = "pod", prefix: str = "") -> Line:
    """A gauge of every process by itself."""
    return Line(f"{metric}{{{_all(IN, matchers)}}}", legend(named, prefix))


def _rate(metric: str, matchers: str, by: str) -> str:
    rates = f"rate({metric}{{{_all(IN, matchers)}}}[$__rate_interval])"
    return f"sum by ({by}) ({rates})" if by else f"sum({rates})"


def _all(*matchers: str) -> str:
    return ", ".join(matcher for matcher in matchers if matcher)


# --- as Grafana reads it ---


def dashboard_json(dashboard: Dashboard) -> dict[str, Any]:
    """A dashboard with variables for its Prometheus and the namespaces."""
    panels: list[dict[str, Any]] = []
    top = 0
    for heading, row in dashboard.rows:
        place = {"h": 1, "w": WIDTH * ACROSS, "x": 0, "y": top}
        panels.append(
            {"id": len(panels) + 1, "type": "row", "title": heading, "collapsed": False, "gridPos": place, "panels": []}
        )
        top += 1
        for number, shown in enumerate(row):
            x, y = number % ACROSS * WIDTH, top + number // ACROSS * HEIGHT
            panels.append(_panel_json(len(panels) + 1, shown, {"h": HEIGHT, "w": WIDTH, "x": x, "y": y}))
        top += -(-len(row) // ACROSS) * HEIGHT
    return {
        "uid": f"inkwell-{dashboard.name}",
        "title": dashboard.title,
        "tags": ["inkwell"],
        "schemaVersion": 39,
        "editable": False,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "templating": {
            "list": [
                {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"},
                {
                    "name": "namespace",
                    "type": "query",
                    "datasource": SOURCE,
                    "query": "label_values(inkwell_build_info, namespace)",
                    "refresh": 2,
                    "multi": True,
                    "includeAll": True,
                    # Also where nothing gives series a namespace, as on one machine.
                    "allValue": ".*",
                    "current": {"text": "All", "value": "$__all"},
                },
            ]
        },
        "panels": panels,
    }


def _panel_json(number: int, shown: Panel, place: dict[str, int]) -> dict[str, Any]:
    return {
        "id": number,
        "type": "timeseries",
        "title": shown.title,
        "description": shown.about,
        "datasource": SOURCE,
        "gridPos": place,
        "fieldConfig": {"defaults": {"unit": shown.unit, "min": 0, "custom": {"fillOpacity": 8}}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": [
            {
                "refId": chr(ord("A") + index),
                "datasource": SOURCE,
                "expr": line.expr,
                "legendFormat": line.legend,
                "exemplar": "_bucket" in line.expr,
            }
            for index, line in enumerate(shown.lines)
        ],
    }
