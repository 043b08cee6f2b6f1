"""Graphs as sessions, for the compiler's own use: the torch modules themselves, and one that notes what it is fed."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from services.compiler.export.exported import ExportedGraph
from services.runtimes.artifacts.manifest import Port, RuntimeName
from services.runtimes.sessions.interface import Session


class ReferenceSession:
    """The torch module that a graph was exported from: interface.Session."""

    runtime: RuntimeName = "torch"

    def __init__(self, graph: ExportedGraph) -> None:
        self._graph = graph
        self.inputs: tuple[Port, ...] = graph.inputs
        self.outputs: tuple[Port, ...] = graph.outputs

    def run(self, feeds: Mapping[str, Tensor], wanted: Sequence[str] | None = None) -> dict[str, Tensor]:
        """See Session."""
        with torch.inference_mode():
            answer = self._graph.reference(feeds)
        # Its own copy: a module may answer with a view of what it was given.
        return {name: tensor.clone() for name, tensor in answer.items() if wanted is None or name in wanted}

    def close(self) -> None:
        """Nothing to free: the module is the export's."""


class RecordingSession:
    """Another session, whose inputs are kept to calibrate on: evenly from all runs, up to a count and size."""

    def __init__(self, session: Session, *, count_most: int = 48, bytes_most: int = 512 * 1024 * 1024) -> None:
        self._session = session
        self._count_most, self._bytes_most = count_most, bytes_most
        self._runs, self._stride, self._bytes = 0, 1, 0
        self.feeds: list[dict[str, Tensor]] = []
        self.runtime: RuntimeName = session.runtime
        self.inputs: tuple[Port, ...] = session.inputs
        self.outputs: tuple[Port, ...] = session.outputs

    def run(self, feeds: Mapping[str, Tensor], wanted: Sequence[str] | None = None) -> dict[str, Tensor]:
        """See Session."""
        if self._runs % self._stride == 0:
            # Copied: callers pass slices of buffers that they go on writing to.
            copy = {name: tensor.detach().clone() for name, tensor in feeds.items()}
            self.feeds.append(copy)
            self._bytes += sum(tensor.nbytes for tensor in copy.values())
            while len(self.feeds) > 1 and (len(self.feeds) > self._count_most or self._bytes > self._bytes_most):
                self.feeds = self.feeds[::2]
                self._stride *= 2
                self._bytes = sum(tensor.nbytes for feed in self.feeds for tensor in feed.values())
        self._runs += 1
        return self._session.run(feeds, wanted)

    def close(self) -> None:
        """See Session."""
        self._session.close()
