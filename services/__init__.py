"""Inkwell's services. Settings of native libraries that must stand before they are first loaded are made here."""

import os
import sys

# gRPC: its own lines on standard error are no JSON; what matters of them shows in statuses, health and metrics.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
# Processes are started with exec, never forked to go on in Python, so its fork handlers have nothing to protect.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "false")
# OpenMP, below torch: by default its threads spin for milliseconds while they wait for each other, and on a machine or
# in a container whose cores others use too, a decoding step then takes several times as long as it should. Not spinning
# at all costs as much on quiet cores where the parallel parts are short: twice the time of a picture of emoji-tiny, a
# tenth of a decoding step of TrOCR-base. About a quarter of a millisecond bridges the gaps between two parts.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "8000")

# OpenVINO and NNCF report to their makers what they are used for, unless this package cannot be imported: nothing that
# is done here is anybody else's business.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
