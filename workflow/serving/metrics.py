"""The metrics that Prometheus scrapes."""

from workflow.image_classifier import ImagePrediction

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)  # bounds of the latency's buckets
SIMILARITIES = (0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1)


class Metrics:
    """The metrics of one application, in a separate registry, so that a process can run several applications."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter("serve_requests", "Requests", ["route", "status"], registry=registry)
        self.seconds = Histogram(
            "serve_request_seconds", "Request duration in seconds", ["route"], buckets=SECONDS, registry=registry
        )
        self.predictions = Counter("serve_predictions", "Images by predicted class", ["label"], registry=registry)
        self.unknown = Counter("serve_unknown", "Images that are probably none of the classes", registry=registry)
        self.similarity = Histogram(
            "serve_similarity", "Similarity to the nearest training image", buckets=SIMILARITIES, registry=registry
        )
        self.model = Gauge("serve_model", "1 for the served version", ["version"], registry=registry)
        self.reloads = Counter("serve_reloads", "Attempts to load a new version", ["result"], registry=registry)
        for result in ("loaded", "failed"):
            self.reloads.labels(result)  # Prometheus cannot count the first event of a counter that did not exist
        self.queue = Gauge("serve_queue_length", "Images waiting for the model", registry=registry)
        self.log_failures = Counter("serve_log_failures", "Failed writes to the prediction log", registry=registry)
        self.log_lost = Counter("serve_log_lost", "Predictions missing from the prediction log", registry=registry)
        self.shadow = Counter(
            "serve_shadow_predictions", "Images by the shadow's predicted class", ["label", "agrees"], registry=registry
        )
        self.shadow_dropped = Counter("serve_shadow_dropped", "Images the shadow dropped", registry=registry)

    def count_request(self, route: str, status: int, seconds: float) -> None:
        self.requests.labels(route, status).inc()
        self.seconds.labels(route).observe(seconds)

    def count_prediction(self, prediction: ImagePrediction) -> None:
        self.predictions.labels(prediction.label).inc()
        self.unknown.inc(bool(prediction.unknown))
        if prediction.similarity is not None:
            self.similarity.observe(prediction.similarity)

    def export(self, version: str) -> bytes:
        """Return all metrics in Prometheus's text format.

        Args:
            version: the version that is served
        """
        self.model.clear()
        self.model.labels(version).set(1)
        return generate_latest(self.registry)
