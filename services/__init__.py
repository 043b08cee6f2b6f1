"""Inkwell's services. Settings of the gRPC library that must stand before it is first imported are made here."""

import os

# Its own lines on standard error are no JSON; what matters of them shows in statuses, health and metrics.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
# Processes are started with exec, never forked to go on in Python, so its fork handlers have nothing to protect.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "false")
