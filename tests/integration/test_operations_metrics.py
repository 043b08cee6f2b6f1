"""What a page of metrics tells of operations, and of the replicas of the Postgres that keeps them."""

import asyncio
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from prometheus_client import CollectorRegistry, generate_latest

from services.kit.operations.log import Log
from services.kit.operations.seen import OperationsMetrics
from services.local import free_ports
from tests.support import operations
from tests.support.child_work import Todo
from tests.support.operations import Caller, Settings
from tests.support.postgres import Postgres, postgres


def page(registry: CollectorRegistry) -> dict[str, float]:
    lines = generate_latest(registry).decode().splitlines()
    found = [re.fullmatch(r"(inkwell_(?:operation|postgres)\S*) (\S+)", line) for line in lines]
    return {match[1]: float(match[2]) for match in found if match}


async def test_what_waits_runs_and_ended(tmp_path: Path) -> None:
    server = operations.build(Settings(operations_database=str(tmp_path / "operations.sqlite"), drain_grace_s=10))
    await server.start()
    caller = Caller(server.port)

    async def until(holds: Callable[[dict[str, float]], bool]) -> None:
        while True:
            if holds(page(server.metrics.registry)):
                return
            await asyncio.sleep(0.02)  # the page tells nobody

    try:
        begun = [await caller.begin(Todo(wait_for=str(tmp_path / "go"))) for _ in range(3)]
        await caller.until(begun[0].name, "started")
        await until(lambda page: (page["inkwell_operations_running"], page["inkwell_operations_waiting"]) == (1, 2))
        assert 0 <= page(server.metrics.registry)["inkwell_operations_silent_seconds"] < 60
        (tmp_path / "go").touch()
        for operation in begun:
            await caller.events(operation.name)
        await until(lambda page: page["inkwell_operations_running"] == page["inkwell_operations_waiting"] == 0)
        found = page(server.metrics.registry)
        assert found['inkwell_operations_total{kind="work",outcome="succeeded"}'] == 3
        assert found['inkwell_operation_seconds_count{kind="work"}'] == 3
        assert found['inkwell_operation_seconds_sum{kind="work"}'] > 0
    finally:
        await server.stop()
        await caller.channel.close()


# --- replicas of Postgres ---


@pytest.fixture
def primary() -> Iterator[Postgres]:
    with postgres() as server:
        yield server


@pytest.fixture
def standby(primary: Postgres) -> Iterator[sa.Engine]:
    """A connection to a replica that follows the primary under the name `standby`."""
    (port,) = free_ports(1)
    following = f"host=127.0.0.1 port={primary.port} user=inkwell application_name=standby"
    primary.run("pg_basebackup", "-d", following, "-D", "standby", "-R", "--checkpoint=fast", "--no-sync")
    options = f"-p {port} -k {primary.folder} -c fsync=off -c primary_conninfo='{following}'"
    primary.run("pg_ctl", "-D", "standby", "-l", "standby.log", "-w", "-o", options, "start")
    engine = connected(f"postgresql://inkwell@127.0.0.1:{port}/postgres")
    try:
        yield engine
    finally:
        engine.dispose()
        primary.run("pg_ctl", "-D", "standby", "-m", "immediate", "stop")


def connected(address: str) -> sa.Engine:
    return sa.create_engine(
        address.replace("postgresql:", "postgresql+psycopg:"), isolation_level="AUTOCOMMIT", poolclass=sa.NullPool
    )


def run(engine: sa.Engine, sql: str) -> None:
    with engine.connect() as connection:
        connection.execute(sa.text(sql))


def metrics_of(log: Log) -> dict[str, float]:
    registry = CollectorRegistry()
    OperationsMetrics(registry).replicas(log.replicas())
    return {name: value for name, value in page(registry).items() if name.startswith("inkwell_postgres")}


async def test_a_replica_that_falls_behind_is_seen_and_catches_up(primary: Postgres, standby: sa.Engine) -> None:
    writer = connected(primary.address)
    log = Log(sa.make_url(primary.address.replace("postgresql:", "postgresql+psycopg:")), schema="inkwell_test")
    behind = 'inkwell_postgres_lag_bytes{replica="standby"}'
    late = 'inkwell_postgres_lag_seconds{replica="standby"}'

    async def until(holds: Callable[[dict[str, float]], bool]) -> dict[str, float]:
        while True:
            found = await asyncio.to_thread(metrics_of, log)
            if holds(found):
                return found
            await asyncio.sleep(0.05)  # Postgres tells nobody

    try:
        await until(lambda found: found.get(behind) == 0)
        run(standby, "SELECT pg_wal_replay_pause()")
        run(writer, "CREATE TABLE written AS SELECT repeat('x', 1000) FROM generate_series(1, 2000)")
        found = await until(lambda found: found[behind] > 1_000_000)
        assert late in found
        run(standby, "SELECT pg_wal_replay_resume()")
        await until(lambda found: found[behind] == 0)
    finally:
        writer.dispose()
        log.close()


async def test_who_may_not_know_of_replicas_sees_none(primary: Postgres, standby: sa.Engine) -> None:
    writer = connected(primary.address)
    run(writer, "CREATE USER somebody")
    log = Log(sa.make_url(f"postgresql+psycopg://somebody@127.0.0.1:{primary.port}/postgres"), schema="inkwell_test")
    try:
        assert log.replicas() == []
        run(writer, "GRANT pg_monitor TO somebody")
        assert [replica.name for replica in log.replicas()] == ["standby"]
    finally:
        writer.dispose()
        log.close()
