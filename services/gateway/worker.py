"""`python -m services.gateway.worker NUMBER DESCRIPTOR`: one process of a gateway that has several.

Started by services/gateway/supervisor.py, with its settings in the environment; DESCRIPTOR is its end of a socket pair.
"""

import socket
import sys

import structlog

from services.gateway.__main__ import build, saying_what_is_wrong
from services.gateway.member import Member
from services.gateway.settings import Settings
from services.kit.server import run


def main() -> None:
    """Serve until SIGTERM, or until the supervisor is gone."""
    number, descriptor = (int(argument) for argument in sys.argv[1:])
    structlog.contextvars.bind_contextvars(process=number)
    with saying_what_is_wrong():
        settings = Settings()
        member = Member(socket.socket(fileno=descriptor), wait_settled_s=settings.connect_timeout_s)
        server = build(settings, member=member)
    run(server)


if __name__ == "__main__":
    main()
