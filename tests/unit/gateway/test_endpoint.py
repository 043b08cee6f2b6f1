"""What a failed call says about its endpoint."""

import asyncio

from services.gateway.endpoint import ChannelOptions, Endpoint, State
from tests.support.backend import Backend


class Followed:
    """An endpoint of a backend, and its changes."""

    def __init__(self, backend: Backend) -> None:
        self.changed = asyncio.Event()
        self.states: list[State] = []
        self.endpoint = Endpoint(
            backend.address, pool="p", hardware="cpu", options=ChannelOptions(), on_change=self._note
        )
        self.endpoint.start()

    def _note(self, endpoint: Endpoint) -> None:
        self.states.append(endpoint.state)
        self.changed.set()

    async def until(self, state: State) -> None:
        while self.endpoint.state is not state:
            self.changed.clear()
            await self.changed.wait()


async def test_a_call_that_met_no_connection_takes_the_endpoint_out_before_the_watch_notices() -> None:
    backend = await Backend().start()
    followed = Followed(backend)
    await followed.until(State.READY)
    endpoint = followed.endpoint
    # What the server itself says leaves the endpoint in; so does an error of one call while the connection stands.
    endpoint.failed("engine lost", said_by_server=True)
    endpoint.failed("stream reset", said_by_server=False)
    assert (endpoint.state, endpoint.unavailable, endpoint.last_error) == (State.READY, 2, "stream reset")

    await endpoint._channel.close()
    endpoint.failed("connection refused", said_by_server=False)
    assert followed.states == [State.READY, State.UNREACHABLE]
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
