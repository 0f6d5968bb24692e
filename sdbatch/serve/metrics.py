"""What Prometheus reads at /metrics. No prompts; of a key only its name."""

from contextvars import ContextVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

OUTCOMES = ("drawn", "failed", "cancelled", "refused")
# The name of the API key whose request the current task answers; tasks that it starts inherit it.
key_name: ContextVar[str] = ContextVar("key_name", default="none")
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
        self.key_images = Counter(
            "sdbatch_key_images",
            "Images by API key and outcome.",
            ["key", "outcome"],
            registry=registry,
        )
        self.key_seconds = Counter(
            "sdbatch_key_image_seconds",
            "Seconds from the start of an image's request to its end, by API key.",
            ["key"],
            registry=registry,
        )
        self.waiting = Gauge(
            "sdbatch_images_waiting", "Images that wait for their turn.", ["key"], registry=registry
        )
        self.drawing = Gauge(
            "sdbatch_images_drawing", "Images that replicas draw.", ["key"], registry=registry
        )
        self.redrawn = Counter(
            "sdbatch_images_redrawn",
            "Images drawn again because their replica died.",
            registry=registry,
        )
        for outcome in OUTCOMES:
            self.images.labels(outcome)

    def count_images(self, outcome: str, images: int = 1, seconds: float = 0.0) -> None:
        """Count images of the current request's key.

        Args:
            outcome: one of OUTCOMES.
            images: how many.
            seconds: from the start of their request to their end, each.
        """
        key = key_name.get()
        self.images.labels(outcome).inc(images)
        self.key_images.labels(key, outcome).inc(images)
        self.key_seconds.labels(key).inc(images * seconds)
        if outcome == "drawn":
            self.seconds.observe(seconds)

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self._registry)
