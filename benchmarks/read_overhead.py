"""What gRPC and the gateway add to a warm `inkwell read` of one embedded sample.

One interleaved run: each round reads the sample through the gateway and straight from the OCR service. The added time
of a call is its wall time at the client less the engine's own time, which the reply carries.
"""

import statistics
import time

from benchmarks._bars import Bar, at_most
from inkwell import Client
from services import local

ROUNDS = 200
WARM_UP = 20


def run() -> dict[str, Bar]:
    """Bars in milliseconds."""
    sample = sorted(local.SAMPLES.glob("*.png"))[0].read_bytes()
    added: dict[str, list[float]] = {"gateway": [], "direct": []}
    engine: list[float] = []
    with local.running_on_free_ports() as services:
        addresses = {"gateway": services["gateway"].address, "direct": services["ocr"].address}
        clients = {name: Client(address) for name, address in addresses.items()}
        try:
            for round_number in range(WARM_UP + ROUNDS):
                for name, client in clients.items():
                    began = time.perf_counter()
                    reading = client.read(sample)
                    wall_ms = (time.perf_counter() - began) * 1000
                    if round_number >= WARM_UP:
                        added[name].append(wall_ms - reading.timing.engine_ms)
                        engine.append(reading.timing.engine_ms)
        finally:
            for client in clients.values():
                client.close()
    medians = {name: statistics.median(values) for name, values in added.items()}
    print(f"  engine {statistics.median(engine):.1f} ms; added: direct {medians['direct']:.2f} ms,", end=" ")
    print(f"through the gateway {medians['gateway']:.2f} ms (medians of {ROUNDS})")
    return {"added_ms_at_the_median": at_most(medians["gateway"], 5.0)}
