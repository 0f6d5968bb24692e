"""What Prometheus reads at /metrics. No prompts; of a key only its name."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

OUTCOMES = ("drawn", "failed", "cancelled", "refused")
_SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)


class Metrics:
    """The counters of one service."""

    def __init__(self) -> None:
        registry = CollectorRegistry()
        self._registry = registry
        self.requests = Counter(
            "sdbatch_requests", "Requests answered.", ["route", "status", "key"], registry=registry
        )
        self.images = Counter(
            "sdbatch_images", "Images by their outcome.", ["outcome"], registry=registry
        )
        self.seconds = Histogram(
            "sdbatch_image_seconds",
            "Seconds from the start of an image's request to its file.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.open = Gauge(
            "sdbatch_images_open", "Images that wait or are being drawn.", registry=registry
        )
        for outcome in OUTCOMES:
            self.images.labels(outcome)

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self._registry)
