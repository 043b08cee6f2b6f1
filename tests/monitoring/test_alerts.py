"""Every alert by promtool: it fires when it should, and stays quiet when things only look like it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from services.local import ROOT
from tests.support import prometheus

NS = 'namespace="inkwell"'
CPU = f'{NS}, pool="ocr-cpu"'
POD = f'{NS}, pod="ocr-cpu-0", pool="ocr-cpu", job="inkwell-ocr"'
GATEWAY = f'{NS}, pod="gateway-0", job="inkwell-gateway"'


@dataclass(frozen=True)
class Case:
    """Series as promtool writes them, and whether the alert fires at a time.

    fires: the labels besides severity, alertname and namespace; None if it stays quiet. step: of the series.
    """

    alert: str
    what: str
    at: str
    series: dict[str, str]
    fires: dict[str, str] | None = None
    summary: str = ""
    step: str = "1m"
    namespace: str = "inkwell"
    severity: str = "ticket"


def requests(ok: str, bad: str = "0x4000", code: str = "UNAVAILABLE") -> dict[str, str]:
    of = f'inkwell_gateway_requests_total{{{CPU}, method="m", code='
    return {f'{of}"OK"}}': ok, f'{of}"{code}"}}': bad}


def recognize(good: str, all_: str) -> dict[str, str]:
    labels = f'{GATEWAY}, service="gateway", method="inkwell.ocr.v1.OcrService/Recognize"'
    return {
        f'inkwell_request_seconds_bucket{{{labels}, le="2.5"}}': good,
        f"inkwell_request_seconds_count{{{labels}}}": all_,
    }


def waits(metric: str, short: str, long: str) -> dict[str, str]:
    return {
        f'{metric}_bucket{{{CPU}, le="30.0"}}': short,
        f'{metric}_bucket{{{CPU}, le="60.0"}}': long,
        f'{metric}_bucket{{{CPU}, le="+Inf"}}': long,
    }


FAST, SLOW = "InkwellErrorBudgetBurnsFast", "InkwellErrorBudgetBurnsSlowly"
BURNS = "of the calls are bad; the month's error budget will not last"
LEAVES = "of the calls are bad, more than the objective leaves"
MINE = {"pod": "ocr-cpu-0", "pool": "ocr-cpu", "job": "inkwell-ocr"}

FIRING = [
    Case(
        FAST,
        "a tenth fails for an hour",
        "70m",
        requests("0+90x80", "0+10x80"),
        {"slo": "availability"},
        f"availability: 10% {BURNS}",
        severity="page",
    ),
    Case(
        FAST,
        "one in a hundred fails for six hours",
        "370m",
        requests("0+99x400", "0+1x400"),
        {"slo": "availability"},
        f"availability: 1% {BURNS}",
        severity="page",
        step="5m",
    ),
    Case(
        FAST,
        "nine of ten lines are late",
        "70m",
        recognize("0+1x80", "0+10x80"),
        {"slo": "recognize-latency"},
        f"recognize-latency: 90% {BURNS}",
        severity="page",
    ),
    Case(
        SLOW,
        "one in two hundred fails for a day",
        "1500m",
        requests("0+995x400", "0+5x400", "INTERNAL"),
        {"slo": "availability"},
        f"availability: 0.5% {LEAVES}",
        step="5m",
    ),
    Case(
        SLOW,
        "pictures begin late for three days",
        "74h",
        {
            f'inkwell_first_progress_seconds_bucket{{{NS}, job="inkwell-diffusion", le="10.0"}}': "0+9x1000",
            f'inkwell_first_progress_seconds_count{{{NS}, job="inkwell-diffusion"}}': "0+10x1000",
        },
        {"slo": "paint-latency"},
        f"paint-latency: 10% {LEAVES}",
        step="5m",
    ),
    Case(
        "InkwellQueueWaitLong",
        "for the engine",
        "25m",
        waits("inkwell_queue_seconds", "0x40", "0+10x40"),
        {"pool": "ocr-cpu"},
        "one in ten calls waits more than 57s for pool ocr-cpu",
    ),
    Case(
        "InkwellQueueWaitLong",
        "at the gateway",
        "25m",
        waits("inkwell_gateway_wait_seconds", "0x40", "0+10x40"),
        {"pool": "ocr-cpu"},
        "one in ten calls waits more than 57s for pool ocr-cpu",
    ),
    Case(
        "InkwellCallsRejected",
        "at the door",
        "25m",
        requests("0+90x40") | {f'inkwell_gateway_refused_total{{{CPU}, reason="QUEUE_FULL"}}': "0+10x40"},
        {"pool": "ocr-cpu"},
        "10% of the calls for pool ocr-cpu are turned away",
    ),
    Case(
        "InkwellCallsRejected",
        "by the pool's own queue",
        "25m",
        requests("0+80x40", "0+20x40", "RESOURCE_EXHAUSTED"),
        {"pool": "ocr-cpu"},
        "20% of the calls for pool ocr-cpu are turned away",
    ),
    Case(
        "InkwellPoolAbsent",
        "calls wait and no pod comes",
        "20m",
        {f"inkwell_gateway_waiting{{{CPU}}}": "3x30", f'inkwell_gateway_endpoints{{{CPU}, state="ready"}}': "0x30"},
        {"pool": "ocr-cpu"},
        "3 calls want pool ocr-cpu, which has had no ready endpoint for 15 minutes",
        severity="page",
    ),
    Case(
        "InkwellEndpointEjected",
        "it stays out",
        "15m",
        {f"inkwell_gateway_ejected{{{CPU}}}": "1x20"},
        {"pool": "ocr-cpu"},
        "1 endpoints of pool ocr-cpu are left out for their failures",
    ),
    Case(
        "InkwellEngineStuck",
        "in a step",
        "5m",
        {f"inkwell_engine_step_age_seconds{{{POD}}}": "0+60x10"},
        MINE,
        "the engine of ocr-cpu-0 has made no step for 5m 0s",
        severity="page",
    ),
    Case(
        "InkwellEngineStuck",
        "without a word",
        "2m",
        {f"inkwell_engine_silent_seconds{{{POD}}}": "45x10"},
        MINE,
        "the engine of ocr-cpu-0 has made no step for 45s",
        severity="page",
    ),
    Case(
        "InkwellEngineRestarts",
        "four times",
        "30m",
        {f"inkwell_engine_restarts_total{{{POD}}}": "0x4 1x4 2x4 3x4 4x20"},
        MINE,
        "the engine of ocr-cpu-0 ended 4 times within half an hour",
    ),
    Case(
        "InkwellProcessRestarts",
        "three times",
        "40m",
        {f"process_start_time_seconds{{{POD}}}": "0x9 600x9 1200x9 1800x9 1800x9"},
        MINE,
        "ocr-cpu-0 was started anew 3 times within an hour",
    ),
    Case(
        "InkwellNotReady",
        "it does not load",
        "20m",
        {f"inkwell_ready{{{POD}}}": "0x30", f"inkwell_drain_seconds{{{POD}}}": "0x30"},
        MINE,
        "ocr-cpu-0 has not been ready for 15 minutes",
    ),
    Case(
        "InkwellDrainTooLong",
        "calls do not end",
        "2m",
        {f"inkwell_drain_seconds{{{POD}}}": "0+60x5", f"inkwell_drain_grace_seconds{{{POD}}}": "30x5"},
        MINE,
        "ocr-cpu-0 still drains 1m 30s after its grace",
    ),
    Case(
        "InkwellTargetDown", "no page", "10m", {f"up{{{POD}}}": "0x20"}, MINE, "the metrics of ocr-cpu-0 cannot be read"
    ),
    Case(
        "InkwellGatewayAbsent",
        "none is scraped",
        "5m",
        {f"up{{{POD}}}": "1x20"},
        {},
        "no gateway answers",
        namespace="",
        severity="page",
    ),
    Case(
        "InkwellGatewayAbsent",
        "none answers",
        "5m",
        {f"up{{{GATEWAY}}}": "0x20"},
        {},
        "no gateway answers",
        namespace="",
        severity="page",
    ),
    Case(
        "InkwellDeviceMemoryFull",
        "nearly all is taken",
        "20m",
        {
            f'inkwell_device_memory_used_bytes{{{POD}, device="0", hardware="cuda"}}': "98x30",
            f'inkwell_device_memory_bytes{{{POD}, device="0", hardware="cuda"}}': "100x30",
        },
        MINE | {"device": "0", "hardware": "cuda"},
        "device 0 of ocr-cpu-0 has 98% of its memory in use",
    ),
    Case(
        "InkwellVersionsMixed",
        "a rollout that stopped",
        "130m",
        {
            f'inkwell_build_info{{{NS}, pod="a", service="ocr", version="1"}}': "1x150",
            f'inkwell_build_info{{{NS}, pod="b", service="ocr", version="2"}}': "1x150",
        },
        {},
        "2 versions have run side by side for two hours",
    ),
    Case(
        "InkwellCertificateExpiresSoon",
        "in three days",
        "2h",
        {f"inkwell_certificate_expires_seconds{{{POD}}}": "266400x150"},
        MINE,
        "the certificate of ocr-cpu-0 expires in 3d 0h 0m 0s and was not renewed",
    ),
    Case(
        "InkwellCertificateExpires",
        "in two hours",
        "10m",
        {f"inkwell_certificate_expires_seconds{{{POD}}}": "7800x30"},
        MINE,
        "the certificate of ocr-cpu-0 expires in 2h 0m 0s: then nobody can connect",
        severity="page",
    ),
    Case(
        "InkwellConfigurationRefused",
        "the pools' file",
        "10m",
        {f"inkwell_gateway_config_refused{{{GATEWAY}}}": "1x20"},
        {"pod": "gateway-0", "job": "inkwell-gateway"},
        "gateway-0 keeps to an old configuration or access file, for the new one is wrong",
    ),
    Case(
        "InkwellConfigurationRefused",
        "the access file",
        "10m",
        {f"inkwell_gateway_access_file_wrong{{{GATEWAY}}}": "1x20"},
        {"pod": "gateway-0", "job": "inkwell-gateway"},
        "gateway-0 keeps to an old configuration or access file, for the new one is wrong",
    ),
    Case(
        "InkwellOperationsDatabaseAway",
        "no write succeeds",
        "3m",
        {f"inkwell_operations_silent_seconds{{{POD}}}": "0+60x5"},
        MINE,
        "ocr-cpu-0 has not reached the operations' database for 3m 0s",
        severity="page",
    ),
    Case(
        "InkwellPostgresLag",
        "in time",
        "10m",
        {f'inkwell_postgres_lag_seconds{{{POD}, replica="b"}}': "60x20"},
        {"replica": "b"},
        "replica b of the operations' database is behind",
    ),
    Case(
        "InkwellPostgresLag",
        "in bytes, of a replica that applies nothing",
        "10m",
        {
            f'inkwell_postgres_lag_bytes{{{POD}, replica="b"}}': "1000000000x20",
            f'inkwell_postgres_lag_seconds{{{POD}, replica="b"}}': "0x20",
        },
        {"replica": "b"},
        "replica b of the operations' database is behind",
    ),
    Case(
        "InkwellOperationsFail",
        "half of them",
        "70m",
        {
            f'inkwell_operations_total{{{POD}, kind="compile", outcome="failed"}}': "0+1x80",
            f'inkwell_operations_total{{{POD}, kind="compile", outcome="succeeded"}}': "0+1x80",
        },
        {"job": "inkwell-ocr"},
        "50% of the operations of inkwell-ocr fail",
    ),
]

QUIET = [
    Case(FAST, "one in two thousand fails", "370m", requests("0+1999x400", "0+1x400"), step="5m"),
    Case(FAST, "what failed is over", "100m", requests("0+90x120", "0+10x50 500x70")),
    Case(FAST, "the only call of a night fails", "70m", requests("0x80", "0x30 1x50")),
    Case(FAST, "callers give up and make mistakes", "70m", requests("0+50x80", "0+50x80", "INVALID_ARGUMENT")),
    Case(SLOW, "one in two thousand fails", "1500m", requests("0+1999x400", "0+1x400"), step="5m"),
    Case(
        SLOW,
        "an hour failed, and the rest of the day did not",
        "1500m",
        requests("0+999x400", "0+1x12 12x388"),
        step="5m",
    ),
    Case(
        "InkwellQueueWaitLong", "they wait, but not long", "25m", waits("inkwell_queue_seconds", "0+10x40", "0+10x40")
    ),
    Case("InkwellQueueWaitLong", "a short wave", "25m", waits("inkwell_queue_seconds", "0x40", "0x12 0+10x4 40x24")),
    Case(
        "InkwellCallsRejected",
        "one in a hundred",
        "25m",
        requests("0+99x40") | {f'inkwell_gateway_refused_total{{{CPU}, reason="QUEUE_FULL"}}': "0+1x40"},
    ),
    Case(
        "InkwellPoolAbsent",
        "nobody wants it",
        "20m",
        {f"inkwell_gateway_waiting{{{CPU}}}": "0x30", f'inkwell_gateway_endpoints{{{CPU}, state="ready"}}': "0x30"},
    ),
    Case(
        "InkwellPoolAbsent",
        "its pod came",
        "20m",
        {
            f"inkwell_gateway_waiting{{{CPU}}}": "3x30",
            f'inkwell_gateway_endpoints{{{CPU}, state="ready"}}': "0x10 1x20",
        },
    ),
    Case("InkwellEndpointEjected", "it is back", "15m", {f"inkwell_gateway_ejected{{{CPU}}}": "1x9 0x10"}),
    Case(
        "InkwellEngineStuck", "long steps end", "5m", {f"inkwell_engine_step_age_seconds{{{POD}}}": "90 30 90 30 90 30"}
    ),
    Case("InkwellEngineRestarts", "once", "30m", {f"inkwell_engine_restarts_total{{{POD}}}": "0x10 1x30"}),
    Case("InkwellProcessRestarts", "a rollout", "40m", {f"process_start_time_seconds{{{POD}}}": "0x9 600x40"}),
    Case(
        "InkwellNotReady",
        "it drains",
        "20m",
        {f"inkwell_ready{{{POD}}}": "0x30", f"inkwell_drain_seconds{{{POD}}}": "1+60x30"},
    ),
    Case(
        "InkwellDrainTooLong",
        "within its grace",
        "2m",
        {f"inkwell_drain_seconds{{{POD}}}": "0+60x5", f"inkwell_drain_grace_seconds{{{POD}}}": "600x5"},
    ),
    Case("InkwellTargetDown", "one scrape failed", "10m", {f"up{{{POD}}}": "1x4 0 1x20"}),
    Case("InkwellTargetDown", "somebody else's", "10m", {'up{job="mail"}': "0x20"}),
    Case(
        "InkwellGatewayAbsent",
        "one of two is gone",
        "5m",
        {f"up{{{GATEWAY}}}": "0x20", f'up{{{NS}, pod="gateway-1", job="inkwell-gateway"}}': "1x20"},
    ),
    Case(
        "InkwellDeviceMemoryFull",
        "there is room",
        "20m",
        {
            f'inkwell_device_memory_used_bytes{{{POD}, device="0", hardware="cuda"}}': "90x30",
            f'inkwell_device_memory_bytes{{{POD}, device="0", hardware="cuda"}}': "100x30",
        },
    ),
    Case(
        "InkwellVersionsMixed",
        "a rollout of an hour",
        "130m",
        {
            f'inkwell_build_info{{{NS}, pod="a", service="ocr", version="1"}}': "1x60 stale",
            f'inkwell_build_info{{{NS}, pod="b", service="ocr", version="2"}}': "1x150",
        },
    ),
    Case(
        "InkwellCertificateExpiresSoon",
        "in a month",
        "2h",
        {f"inkwell_certificate_expires_seconds{{{POD}}}": "2600000x150"},
    ),
    Case(
        "InkwellCertificateExpires",
        "in three days",
        "10m",
        {f"inkwell_certificate_expires_seconds{{{POD}}}": "266400x30"},
    ),
    Case("InkwellConfigurationRefused", "it is right", "10m", {f"inkwell_gateway_config_refused{{{GATEWAY}}}": "0x20"}),
    Case(
        "InkwellOperationsDatabaseAway",
        "one write was late",
        "3m",
        {f"inkwell_operations_silent_seconds{{{POD}}}": "1 25 1 5 1 1"},
    ),
    Case(
        "InkwellPostgresLag",
        "a checkpoint",
        "10m",
        {f'inkwell_postgres_lag_seconds{{{POD}, replica="b"}}': "0x6 60 0x9"},
    ),
    Case(
        "InkwellOperationsFail",
        "a single one failed",
        "70m",
        {
            f'inkwell_operations_total{{{POD}, kind="compile", outcome="failed"}}': "0x20 1x60",
            f'inkwell_operations_total{{{POD}, kind="compile", outcome="succeeded"}}': "0x80",
        },
    ),
]


def alerts() -> list[dict[str, Any]]:
    return [rule for rule in prometheus.rules() if "alert" in rule]


def groups() -> list[str]:
    files = [yaml.safe_load(path.read_text()) for path in (prometheus.MONITORING / "rules").glob("*.yaml")]
    return [group["name"] for file in files for group in file["spec"]["groups"]]


def as_promtool_reads(case: Case) -> dict[str, Any]:
    expected = []
    if case.fires is not None:
        runbook = next(alert for alert in alerts() if alert["alert"] == case.alert)["annotations"]["runbook"]
        labels = {"severity": case.severity, **case.fires}
        if case.namespace:
            labels["namespace"] = case.namespace
        expected = [{"exp_labels": labels, "exp_annotations": {"summary": case.summary, "runbook": runbook}}]
    return {
        "name": f"{case.alert}: {case.what}",
        "interval": case.step,
        "input_series": [{"series": name, "values": values} for name, values in case.series.items()],
        "alert_rule_test": [{"eval_time": case.at, "alertname": case.alert, "exp_alerts": expected}],
    }


# Of hours and days, every quarter of an hour is looked at, and not every minute.
EVERY = {"1m": "1m", "5m": "15m"}


def only(files: list[Path], *, objectives: bool) -> list[str]:
    """The rules of the objectives and their alerts, or all others: promtool would evaluate them all for each case."""
    for path in files:
        content = yaml.safe_load(path.read_text())
        content["groups"] = [g for g in content["groups"] if g["name"].startswith("inkwell-slo") == objectives]
        path.write_text(yaml.safe_dump(content))
    return [str(path) for path in files]


@pytest.mark.parametrize("step", EVERY)
@pytest.mark.parametrize("objectives", [True, False], ids=["objectives", "others"])
def test_alerts(objectives: bool, step: str, tmp_path: Path) -> None:
    cases = [c for c in (*FIRING, *QUIET) if (c.alert in (FAST, SLOW)) == objectives and c.step == step]
    content = {
        "rule_files": only(prometheus.plain_rules(tmp_path / "rules"), objectives=objectives),
        "evaluation_interval": EVERY[step],
        # What is recorded at a time is to be there when alerts look: at these intervals, older values count as gone.
        "group_eval_order": sorted(groups(), key=lambda name: name.endswith("-alerts")),
        "tests": [as_promtool_reads(case) for case in cases],
    }
    (tmp_path / "tests.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    done = prometheus.promtool("test", "rules", str(tmp_path / "tests.yaml"))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("cases", [FIRING, QUIET], ids=["firing", "quiet"])
def test_there_is_a_case_of_every_alert(cases: list[Case]) -> None:
    assert {case.alert for case in cases} == {alert["alert"] for alert in alerts()}


def test_every_alert_has_a_severity_and_a_page_that_says_what_to_do() -> None:
    pages = {path.relative_to(ROOT).as_posix(): path.read_text() for path in (ROOT / "docs" / "runbooks").glob("*.md")}
    named = set()
    for alert in alerts():
        assert alert["labels"]["severity"] in ("page", "ticket"), alert["alert"]
        page = alert["annotations"]["runbook"]
        assert f"`{alert['alert']}`" in pages[page], f"{page} does not name {alert['alert']}"
        named.add(page)
    assert named == pages.keys()
