"""The Envoy configuration in docs/envoy.md lets through what the gateway serves."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from services.gateway.methods import METHODS
from services.gateway.settings import Settings
from services.kit.server import READINESS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "envoy.md"


@pytest.fixture(scope="module")
def envoy() -> dict[str, Any]:
    text = PAGE.read_text()
    found: dict[str, Any] = yaml.safe_load(text.partition("```yaml\n")[2].partition("```")[0])["static_resources"]
    return found


def test_every_routed_method_has_a_route(envoy: dict[str, Any]) -> None:
    manager = envoy["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
    routes = manager["route_config"]["virtual_hosts"][0]["routes"]
    paths = [*METHODS, "/inkwell.gateway.v1.GatewayService/ListPools", "/grpc.health.v1.Health/Watch"]
    for path in paths:
        (route,) = [route for route in routes if path.startswith(route["match"]["prefix"])]
        assert route["route"]["cluster"] == envoy["clusters"][0]["name"]


def test_it_asks_the_gateway_where_and_for_what_the_gateway_answers(envoy: dict[str, Any]) -> None:
    (cluster,) = envoy["clusters"]
    (check,) = cluster["health_checks"]
    assert check["grpc_health_check"]["service_name"] == READINESS
    address = cluster["load_assignment"]["endpoints"][0]["lb_endpoints"][0]["endpoint"]["address"]["socket_address"]
    assert address["port_value"] == Settings.model_fields["port"].default
