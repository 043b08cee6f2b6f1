"""The engine of a running service is killed while it works on calls, with the gateway in front and without."""

import signal
import threading
from collections.abc import Iterator

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import inkwell
from inkwell.common.v1 import common_pb2
from inkwell.ocr.v1 import ocr_pb2, ocr_pb2_grpc
from services import local

SERVING = health_pb2.HealthCheckResponse.SERVING


@pytest.fixture(scope="module")
def own_fleet() -> Iterator[dict[str, local.Service]]:
    """A fleet that may be harmed."""
    with local.running_on_free_ports() as services:
        yield services


class Readiness:
    """Follows `readiness` of one server, so that a test can wait for a change."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.insecure_channel(address)
        stub = health_pb2_grpc.HealthStub(self._channel)
        self._watch = stub.Watch(health_pb2.HealthCheckRequest(service="readiness"))

    def wait_for(self, serving: bool) -> None:
        for answer in self._watch:
            if (answer.status == SERVING) == serving:
                return

    def close(self) -> None:
        self._watch.cancel()
        self._channel.close()


@pytest.fixture
def readiness(own_fleet: dict[str, local.Service]) -> Iterator[Readiness]:
    followed = Readiness(own_fleet["diffusion"].address)
    followed.wait_for(True)
    yield followed
    followed.close()


def kill_engine(front: local.Service) -> int:
    """kill -9; answers the process id that was killed."""
    (engine,) = psutil.Process(front.pid).children()
    engine.send_signal(signal.SIGKILL)
    return engine.pid


def test_without_a_gateway_the_call_ends_unavailable_and_the_service_recovers(
    own_fleet: dict[str, local.Service], readiness: Readiness
) -> None:
    front = own_fleet["diffusion"]
    with inkwell.Client(front.address) as client:
        call = client.paint_stream("grinning face", steps=200)
        assert any(isinstance(event, inkwell.Progress) for event in call)
        killed = kill_engine(front)
        with pytest.raises(inkwell.Unavailable) as lost:
            list(call)
    assert lost.value.reason == "ENGINE_LOST"
    assert lost.value.retry_after_s is not None
    readiness.wait_for(False)
    readiness.wait_for(True)
    (engine,) = psutil.Process(front.pid).children()
    assert engine.pid != killed
    with inkwell.Client(front.address) as client:
        assert client.paint("grinning face", steps=2)


def test_through_the_gateway_reads_survive_a_kill(own_fleet: dict[str, local.Service]) -> None:
    sample = sorted(local.SAMPLES.glob("*.png"))[0].read_bytes()
    followed = Readiness(own_fleet["ocr"].address)
    followed.wait_for(True)
    channel = grpc.insecure_channel(own_fleet["gateway"].address, options=[("grpc.enable_retries", 0)])
    recognize = ocr_pb2_grpc.OcrServiceStub(channel).Recognize
    request = ocr_pb2.RecognizeRequest(image=common_pb2.Image(content=sample))
    texts: list[str] = []
    failures: list[BaseException] = []
    under_way = threading.Event()

    def caller() -> None:
        try:
            for _ in range(30):
                texts.append(recognize(request, timeout=60).recognition.hypotheses[0].text)
                under_way.set()
        except grpc.RpcError as error:
            failures.append(error)

    callers = [threading.Thread(target=caller) for _ in range(4)]
    for thread in callers:
        thread.start()
    under_way.wait()
    kill_engine(own_fleet["ocr"])
    for thread in callers:
        thread.join()
    assert not failures
    assert len(texts) == 120
    assert len(set(texts)) == 1
    followed.close()
    channel.close()
