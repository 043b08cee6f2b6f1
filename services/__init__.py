"""Inkwell's services. Settings of native libraries that must stand before they are first loaded are made here."""

import os

# gRPC: its own lines on standard error are no JSON; what matters of them shows in statuses, health and metrics.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
# Processes are started with exec, never forked to go on in Python, so its fork handlers have nothing to protect.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "false")
# OpenMP, below torch: its threads otherwise spin while they wait for each other, and on a machine or in a container
# whose cores others use too, a decoding step then takes several times as long as it should.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
