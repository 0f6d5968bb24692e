"""What Prometheus is told, at /metrics. No prompt, and of a key its name alone."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)


class Metrics:
    """Counters of one service."""

    def __init__(self) -> None:
        registry = CollectorRegistry()
        self._registry = registry
        self.requests = Counter(
            "sdbatch_requests", "Requests answered.", ["route", "status", "key"], registry=registry
        )
        self.images = Counter(
            "sdbatch_images", "Images, drawn or not.", ["outcome"], registry=registry
        )
        self.seconds = Histogram(
            "sdbatch_image_seconds",
            "From an image's place in the queue to its file.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.open = Gauge("sdbatch_images_open", "Taken in and not yet drawn.", registry=registry)
        for outcome in OUTCOMES:
            self.images.labels(outcome)

    def text(self) -> bytes:
        """Return all of them as Prometheus reads them."""
        return generate_latest(self._registry)


OUTCOMES = ("drawn", "failed", "cancelled", "refused")
