"""The dashboards: the fleet by hardware, and one a service."""

from panels import IN, Dashboard, Line, Panel, busiest, each, gauge, hourly, mean, panel, quantiles, rate

GATEWAY, OCR, DIFFUSION, COMPILER = (f'job="inkwell-{name}"' for name in ("gateway", "ocr", "diffusion", "compiler"))
_DEVICE = "pod, hardware, device"

Row = tuple[str, tuple[Panel, ...]]


def calls(service: str) -> tuple[Panel, ...]:
    """What every service shows of its calls."""
    mine = f'service="{service}"'
    return (
        panel("Calls by status", rate("inkwell_requests_total", mine, "code"), unit="reqps"),
        panel("Calls by method", rate("inkwell_requests_total", mine, "method"), unit="reqps"),
        panel(
            "Time of calls",
            *quantiles("inkwell_request_seconds", mine, "method"),
            unit="s",
            about="Exemplars lead to traces.",
        ),
    )


def processes(mine: str) -> Row:
    """What every service shows of its processes."""
    return (
        "Processes",
        (
            panel("Processor time", rate("process_cpu_seconds_total", mine, "pod")),
            panel("Memory", gauge("process_resident_memory_bytes", mine, "pod"), unit="bytes"),
            panel(
                "Seconds of draining",
                each("inkwell_drain_seconds", mine),
                each("inkwell_drain_grace_seconds", mine, prefix="grace of"),
                unit="s",
            ),
        ),
    )


def engine(mine: str) -> tuple[Row, ...]:
    """What a service with an engine shows besides."""
    return (
        (
            "Queue",
            (
                panel(
                    "Waiting and running",
                    gauge("inkwell_queue_depth", mine, "pool", "waiting"),
                    gauge("inkwell_engine_calls", mine, "pool", "running"),
                    gauge("inkwell_engine_slots", mine, "pool", "places"),
                ),
                panel("Wait for the engine", *quantiles("inkwell_queue_seconds", mine, "pool", high=0.9), unit="s"),
                panel(
                    "Refused and given up",
                    rate("inkwell_refused_total", mine, "reason"),
                    rate("inkwell_cancelled_total", mine, "phase", "given up while"),
                    unit="reqps",
                ),
            ),
        ),
        (
            "Engine",
            (
                panel(
                    "Pulse",
                    each("inkwell_engine_step_age_seconds", mine, prefix="step"),
                    each("inkwell_engine_silent_seconds", mine, prefix="silence"),
                    unit="s",
                ),
                panel("Processor time", rate("inkwell_engine_cpu_seconds_total", mine, "pod")),
                panel("Memory", each("inkwell_engine_memory_bytes", mine), unit="bytes"),
                panel(
                    "Weights of loaded models",
                    gauge("inkwell_model_weight_bytes", mine, "model, runtime, version"),
                    unit="bytes",
                ),
                panel("Engines lost, an hour", hourly("inkwell_engine_restarts_total", mine, "pod")),
                panel("Calls that came again", rate("inkwell_repeated_total", mine, "outcome"), unit="reqps"),
                panel(
                    "Answers kept for them",
                    gauge("inkwell_repeated_bytes", mine, "pod"),
                    unit="bytes",
                ),
                panel("Calls kept in mind for them", gauge("inkwell_repeated_calls", mine, "pod")),
            ),
        ),
        processes(mine),
    )


FLEET = Dashboard(
    "fleet",
    "Inkwell: the fleet by hardware",
    (
        (
            "Pools",
            (
                panel("Calls that wait or run, by hardware", gauge("hardware:inkwell_demand:calls", by="hardware")),
                panel("Ready endpoints, by hardware", gauge("hardware:inkwell_endpoints:ready", by="hardware")),
                panel("Calls, by hardware", rate("inkwell_requests_total", 'hardware!=""', "hardware"), unit="reqps"),
                panel(
                    "Calls that wait or run, by pool",
                    gauge("pool:inkwell_demand:calls", by="pool"),
                    about="What pools are scaled by.",
                ),
                panel("Of these, waiting", gauge("pool:inkwell_waiting:calls", by="pool")),
                panel("Ready pods, by pool", gauge("inkwell_ready", 'pool!=""', "pool")),
            ),
        ),
        (
            "Devices",
            (
                panel(
                    "Memory in use",
                    Line(
                        f"inkwell_device_memory_used_bytes{{{IN}}} / inkwell_device_memory_bytes{{{IN}}}",
                        "{{pod}} {{hardware}} {{device}}",
                    ),
                    unit="percentunit",
                ),
                panel("Busy", each("inkwell_device_busy_ratio", named=_DEVICE), unit="percentunit"),
                panel("Power, by hardware", gauge("inkwell_device_power_watts", by="hardware"), unit="watt"),
                panel("Temperature", each("inkwell_device_temperature_celsius", named=_DEVICE), unit="celsius"),
                panel("Devices", gauge("inkwell_device_info", by="hardware, name", how="count")),
            ),
        ),
        (
            "Releases and faults",
            (
                panel("Processes by version", gauge("inkwell_build_info", by="service, version", how="count")),
                panel("Engines lost, an hour", hourly("inkwell_engine_restarts_total", 'pool!=""', "pool")),
                panel(
                    "Until certificates expire",
                    Line(f"min by (job) (inkwell_certificate_expires_seconds{{{IN}}}) - time()", "{{job}}"),
                    unit="s",
                ),
            ),
        ),
    ),
)

_OBJECTIVES: Row = (
    "Objectives",
    (
        panel("Bad calls, last hour", gauge("slo:inkwell_errors:ratio_rate1h", by="slo"), unit="percentunit"),
        panel(
            "How fast the error budget burns",
            Line(
                f"sum by (slo) (slo:inkwell_errors:ratio_rate1h{{{IN}}}) / on (slo) (1 - slo:inkwell_objective:ratio)",
                "{{slo}}",
            ),
            about="At 1 it lasts for the month; above 14.4 somebody is woken.",
        ),
        panel("Calls turned away", gauge("pool:inkwell_rejected:ratio_rate5m", by="pool"), unit="percentunit"),
    ),
)

GATEWAY_BOARD = Dashboard(
    "gateway",
    "Inkwell: gateway",
    (
        _OBJECTIVES,
        (
            "Calls",
            (
                *calls("gateway"),
                panel("Calls by pool", rate("inkwell_gateway_requests_total", by="pool"), unit="reqps"),
            ),
        ),
        (
            "Doors",
            (
                panel(
                    "Waiting, inside and the limit",
                    gauge("inkwell_gateway_waiting", by="pool", prefix="waiting"),
                    gauge("inkwell_gateway_admitted", by="pool", prefix="inside"),
                    gauge("inkwell_gateway_limit", by="pool", prefix="limit"),
                ),
                panel("Wait at the door, 90 %", gauge("pool:inkwell_gateway_wait_seconds:p90_5m", by="pool"), unit="s"),
                panel("Refused", rate("inkwell_gateway_refused_total", by="pool, reason"), unit="reqps"),
                panel(
                    "Refused by access rules", rate("inkwell_gateway_refused_access_total", by="reason"), unit="reqps"
                ),
            ),
        ),
        (
            "Endpoints",
            (
                panel("Endpoints by state", gauge("inkwell_gateway_endpoints", by="pool, state", how="max")),
                panel("Under way at endpoints", gauge("inkwell_gateway_in_flight", by="pool")),
                panel("Left out for failures", gauge("inkwell_gateway_ejected", by="pool", how="max")),
                panel("Times left out, an hour", hourly("inkwell_gateway_ejections_total", by="pool, reason")),
                panel(
                    "Retries",
                    rate("inkwell_gateway_retries_total", by="pool, reason"),
                    rate("inkwell_gateway_retries_over_budget_total", by="pool", prefix="not made"),
                    unit="reqps",
                ),
                panel("Retries left", gauge("inkwell_gateway_retry_budget", by="pool")),
            ),
        ),
        (
            "Callers",
            (
                panel(
                    "Calls of the busiest", busiest("inkwell_tenant_requests_total", GATEWAY, "tenant"), unit="reqps"
                ),
                panel(
                    "Time of their calls, a second", busiest("inkwell_tenant_request_seconds_total", GATEWAY, "tenant")
                ),
                panel(
                    "Turned away, late or failed",
                    busiest(
                        "inkwell_tenant_requests_total", f'{GATEWAY}, outcome=~"refused|late|failed"', "tenant, outcome"
                    ),
                    unit="reqps",
                ),
            ),
        ),
        (
            "Itself",
            (
                panel("Worker processes", gauge("inkwell_gateway_processes", by="state")),
                panel(
                    "Worker processes started anew, an hour", hourly("inkwell_gateway_process_restarts_total", by="pod")
                ),
                panel("Configuration read, an hour", hourly("inkwell_gateway_config_reloads_total", by="result")),
                panel(
                    "Files that are wrong",
                    each("inkwell_gateway_config_refused", prefix="configuration"),
                    each("inkwell_gateway_access_file_wrong", prefix="access"),
                ),
                panel("Rate limits counted together", each("inkwell_gateway_limits_shared")),
            ),
        ),
        processes(GATEWAY),
    ),
)

OCR_BOARD = Dashboard(
    "ocr",
    "Inkwell: handwriting",
    (
        ("Calls", calls("ocr")),
        (
            "Reading",
            (
                panel("Tokens decoded, a second", rate("inkwell_decode_tokens_total", OCR, "model")),
                panel("Rows that share a step, on average", mean("inkwell_batch_size", OCR, "model")),
                panel("First text", *quantiles("inkwell_first_progress_seconds", OCR), unit="s"),
                panel("Pages, a second", rate("inkwell_document_pages_total", OCR, "model")),
                panel("Lines of pages, a second", rate("inkwell_document_lines_total", OCR, "outcome")),
                panel("Documents", gauge("inkwell_documents", OCR, "state")),
            ),
        ),
        *engine(OCR),
    ),
)

DIFFUSION_BOARD = Dashboard(
    "diffusion",
    "Inkwell: pictures",
    (
        ("Calls", calls("diffusion")),
        (
            "Painting",
            (
                panel(
                    "One step of one picture", *quantiles("inkwell_denoise_step_seconds", DIFFUSION, "model"), unit="s"
                ),
                panel("Steps, a second", rate("inkwell_denoise_step_seconds_count", DIFFUSION, "model")),
                panel("First step of a call", *quantiles("inkwell_first_progress_seconds", DIFFUSION), unit="s"),
                panel("Pictures side by side, on average", mean("inkwell_batch_size", DIFFUSION, "model")),
            ),
        ),
        *engine(DIFFUSION),
    ),
)

COMPILER_BOARD = Dashboard(
    "compiler",
    "Inkwell: compiler",
    (
        ("Calls", calls("compiler")),
        (
            "Operations",
            (
                panel("Ended, an hour", hourly("inkwell_operations_total", COMPILER, "kind, outcome")),
                panel(
                    "Waiting and running",
                    gauge("inkwell_operations_waiting", COMPILER, "pool", "waiting", how="max"),
                    gauge("inkwell_operations_running", COMPILER, "pool", "running"),
                ),
                panel("Time until the end", *quantiles("inkwell_operation_seconds", COMPILER, "kind"), unit="s"),
                panel(
                    "Failed, last hour",
                    gauge("service:inkwell_operations_failed:ratio_rate1h", by="job"),
                    unit="percentunit",
                ),
            ),
        ),
        (
            "Database",
            (
                panel("Since the last write", each("inkwell_operations_silent_seconds", COMPILER), unit="s"),
                panel("Replicas behind", gauge("inkwell_postgres_lag_seconds", by="replica", how="max"), unit="s"),
                panel("Replicas behind", gauge("inkwell_postgres_lag_bytes", by="replica", how="max"), unit="bytes"),
            ),
        ),
        processes(COMPILER),
    ),
)

ALL = (FLEET, GATEWAY_BOARD, OCR_BOARD, DIFFUSION_BOARD, COMPILER_BOARD)
