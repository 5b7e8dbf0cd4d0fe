"""What a replica counts and times: by Ray's metrics, for the cluster's scrape, and as text at its own ``/metrics``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client import Counter as TextCounter
from prometheus_client import Gauge as TextGauge
from prometheus_client import Histogram as TextHistogram
from ray.util.metrics import Counter, Gauge, Histogram

from deployments.workers import Batch, Piece

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_FINE = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)


class Metrics:
    """All that a replica measures. ``text`` holds this replica's own; Ray's carry its process as a tag."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.first_token = self._histogram("first_token_seconds", "From a request's arrival to its first token")
        self.inter_token = self._histogram("inter_token_seconds", "From a token to the next one of its answer")
        self.queued = self._histogram("queue_seconds", "How long a request waited for slots")
        self.guide_wait = self._histogram(
            "guide_wait_seconds", "How long a step waited for the guides' scores, a mean", _FINE
        )
        self.rows_per_request = self._histogram("rows_per_request", "Rows of a plan", (1, 2, 3, 4, 6, 8, 12, 16))
        self._requests = self._counter("requests", "Answers by how they ended", ("end",))
        self._errors = self._counter("errors", "Errors by kind", ("kind",))
        self._tokens = self._counter("tokens", "Tokens generated")
        self._rebuilds = self._counter("rebuilds", "Gangs made anew after a loss")
        self._running = self._gauge("running", "Requests that decode")
        self._waiting = self._gauge("waiting", "Requests that wait for slots")
        self._rows = self._gauge("rows", "Rows that hold a slot")
        self._kv = self._gauge("kv_use", "Share of the fullest worker's positions of keys and values that is in use")
        self._gangs: dict[str, _Standing] = {}

    def text(self) -> bytes:
        """Prometheus' exposition format."""
        return generate_latest(self._registry)

    def ended(self, end: str) -> None:
        """An answer ended so."""
        self._requests.add(1, (end,))

    def error(self, kind: str) -> None:
        """A request met an error of this kind (its ``type``)."""
        self._errors.add(1, (kind,))

    def rebuilt(self) -> None:
        """A gang lost a member."""
        self._rebuilds.add(1)

    def stands(self, gang: str, batch: Batch, positions: Sequence[int]) -> None:
        """How a gang stands, as it says with its tokens; ``positions`` of keys and values has each of its workers."""
        self._tokens.add(sum(isinstance(event, Piece) and event.token.id >= 0 for event in batch.events))
        kv = max(batch.tokens.get(rank, 0) / all_of_them for rank, all_of_them in enumerate(positions))
        last = self._gangs.get(gang)
        self._gangs[gang] = _Standing(batch, kv)
        waited, steps = (last.batch.waited, last.batch.steps) if last is not None else (0.0, 0)
        if batch.steps > steps and batch.waited > waited:
            self.guide_wait.add((batch.waited - waited) / (batch.steps - steps))
        self._publish()

    def closed(self, gang: str) -> None:
        """A gang is no more; during a reload there are two."""
        self._gangs.pop(gang, None)
        self._publish()

    def _publish(self) -> None:
        batches = [standing.batch for standing in self._gangs.values()]
        self._running.set(sum(batch.running for batch in batches))
        self._waiting.set(sum(batch.waiting for batch in batches))
        self._rows.set(sum(batch.rows for batch in batches))
        self._kv.set(max((standing.kv for standing in self._gangs.values()), default=0.0))

    def _histogram(self, name: str, what: str, bounds: Sequence[float] = _SECONDS) -> _Both:
        full = f"mage_ray_{name}"
        ours = TextHistogram(full, what, registry=self._registry, buckets=tuple(bounds))
        return _Both(Histogram(full, description=what, boundaries=list(bounds)), ours)

    def _counter(self, name: str, what: str, labels: tuple[str, ...] = ()) -> _Both:
        full = f"mage_ray_{name}_total"
        ours = TextCounter(full, what, labels, registry=self._registry)
        return _Both(Counter(full, description=what, tag_keys=labels), ours, labels)

    def _gauge(self, name: str, what: str) -> _Both:
        full = f"mage_ray_{name}"
        return _Both(Gauge(full, description=what), TextGauge(full, what, registry=self._registry))


@dataclass(frozen=True)
class _Standing:
    """What a gang has said last, and how full its fullest worker was."""

    batch: Batch
    kv: float


class _Both:
    """One number in Ray's metrics and in the text."""

    def __init__(self, theirs: Any, ours: Any, labels: tuple[str, ...] = ()) -> None:
        self._theirs, self._ours, self._labels = theirs, ours, labels

    def add(self, value: float, labels: tuple[str, ...] = ()) -> None:
        """Count it, or put it in its bucket."""
        ours = self._ours.labels(*labels) if labels else self._ours
        if isinstance(self._theirs, Histogram):
            self._theirs.observe(value)
            ours.observe(value)
        elif value > 0:
            self._theirs.inc(value, dict(zip(self._labels, labels, strict=True)))
            ours.inc(value)

    def set(self, value: float) -> None:
        """It stands at that now."""
        self._theirs.set(value)
        self._ours.set(value)
