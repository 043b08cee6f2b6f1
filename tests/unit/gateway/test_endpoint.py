"""What a failed call says about its endpoint."""

import asyncio

import grpc

from services.gateway.endpoint import ChannelOptions, Endpoint, State
from tests.support.backend import Backend


class Followed:
    """An endpoint of a backend, and its changes."""

    def __init__(self, backend: Backend) -> None:
        self.changed = asyncio.Event()
        self.states = [State.CONNECTING]
        self.endpoint = Endpoint(
            backend.address, pool="p", hardware="cpu", options=ChannelOptions(), on_change=self._note
        )
        self.endpoint.start()

    def _note(self, endpoint: Endpoint) -> None:
        if self.states[-1] is not endpoint.state:
            self.states.append(endpoint.state)
        self.changed.set()

    async def until(self, state: State) -> None:
        while self.endpoint.state is not state:
            self.changed.clear()
            await self.changed.wait()


def gone(details: str, *trailers: tuple[str, str]) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(
        grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), grpc.aio.Metadata(*trailers), details=details
    )


async def test_a_call_that_met_no_connection_takes_the_endpoint_out_before_the_watch_notices() -> None:
    backend = await Backend().start()
    followed = Followed(backend)
    await followed.until(State.READY)
    endpoint = followed.endpoint
    # What the server itself says leaves the endpoint in; so does an error of one call while the connection stands.
    endpoint.failed(gone("engine lost", ("grpc-retry-pushback-ms", "10")))
    endpoint.failed(gone("stream reset"))
    assert (endpoint.state, endpoint.unavailable, endpoint.last_error) == (State.READY, 2, "stream reset")

    await endpoint._channel.close()
    endpoint.failed(gone("connection refused"))
    assert followed.states == [State.CONNECTING, State.READY, State.UNREACHABLE]
    assert endpoint.last_error == "connection refused"
    await endpoint.close()
    await backend.stop()


async def test_it_is_watched_anew_after_a_broken_connection() -> None:
    backend = await Backend().start()
    followed = Followed(backend)
    await followed.until(State.READY)
    await backend.stop()
    await followed.until(State.UNREACHABLE)
    await backend.restart()
    await followed.until(State.READY)
    await followed.endpoint.close()
    await backend.stop()
