"""Metrics of the API in the text format of Prometheus."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from llava.serve.service.reply import Answered
from llava.serve.service.service import Service

# Upper bounds of the histograms' buckets in seconds, about three per decade.
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)


class Metrics:
    """Counters of one server: responses by HTTP status, and measurements of finished answers."""

    def __init__(self, service: Service):
        self._registry = CollectorRegistry()
        self._registry.register(ServiceCollector(service))
        self._responses = Counter(
            "adav_chat_responses", "Chat requests by HTTP status", ["status"], registry=self._registry
        )
        self._disconnects = Counter(
            "adav_chat_disconnects", "Chat requests whose client was gone before the answer", registry=self._registry
        )
        self._vision = Counter(
            "adav_vision_tokens", "Vision tokens before selection", ["what"], registry=self._registry
        )
        self._seconds = {
            name: Histogram(f"adav_{name}_seconds", text, buckets=SECONDS, registry=self._registry)
            for name, text in (
                ("waited", "Seconds in the queue"),
                ("first_token", "Seconds from the start of the batch to the first token"),
                ("decode", "Seconds from the first token to the last"),
                ("request", "Seconds in all, reading the request included"),
            )
        }

    def responded(self, status: int) -> None:
        """Count a response to a chat request."""
        self._responses.labels(status=str(status)).inc()

    def disconnected(self) -> None:
        """Count a request whose client disconnected before the end of its answer."""
        self._disconnects.inc()

    def answered(self, answered: Answered, seconds: float) -> None:
        """Record a finished answer. seconds: from the arrival of the request to its end."""
        for name, value in (answered.seconds | {"request": seconds}).items():
            self._seconds[name].observe(value)
        kept, total = answered.vision_tokens
        self._vision.labels(what="kept").inc(kept)
        self._vision.labels(what="dropped").inc(total - kept)

    def text(self) -> bytes:
        """All metrics in Prometheus' exposition format, version 0.0.4."""
        return generate_latest(self._registry)


class ServiceCollector:
    """A Prometheus collector that reads the counts of a service when the metrics are requested."""

    def __init__(self, service: Service):
        self._service = service

    def collect(self) -> Iterator[Metric]:
        """The metrics of Service.stats."""
        stats = self._service.stats()
        for name in ("waiting", "running"):
            yield GaugeMetricFamily(f"adav_requests_{name}", f"Requests that are {name}", value=stats[name])
        ended = CounterMetricFamily("adav_requests_ended", "Requests that came to their end", labels=["how"])
        for how in ("answered", "cancelled", "failed"):
            ended.add_metric([how], stats[how])
        yield ended
        tokens = CounterMetricFamily("adav_tokens", "Tokens that the LLM read and wrote", labels=["kind"])
        for kind in ("prompt", "new"):
            tokens.add_metric([kind], stats[f"{kind}_tokens"])
        yield tokens
        batches = CounterMetricFamily("adav_batches", "Batches by the number of their requests", labels=["size"])
        for size, count in stats["batches"].items():
            batches.add_metric([str(size)], count)
        yield batches
