"""What Prometheus reads."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from llamachat.engine.scheduler import Scheduler

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
RATES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


class Metrics:
    """Of one server."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "llamachat_requests", "Requests by how they ended.", ["end"], registry=registry
        )
        self.prompt_tokens = Counter(
            "llamachat_prompt_tokens", "Tokens of prompts.", registry=registry
        )
        self.reused_tokens = Counter(
            "llamachat_reused_tokens", "Of these, those not run anew.", registry=registry
        )
        self.reply_tokens = Counter(
            "llamachat_reply_tokens", "Tokens of replies.", registry=registry
        )
        self.ttft = Histogram(
            "llamachat_time_to_first_token_seconds",
            "From a request to its first text.",
            buckets=SECONDS,
            registry=registry,
        )
        self.rate = Histogram(
            "llamachat_reply_tokens_per_second",
            "Of each reply, after its first token.",
            buckets=RATES,
            registry=registry,
        )
        self.waiting = Gauge("llamachat_requests_waiting", "In the queue.", registry=registry)
        self.rows = Gauge("llamachat_rows_running", "Rows in use.", registry=registry)
        self.free = Gauge("llamachat_cache_slots_free", "Slots without data.", registry=registry)

    def watch(self, scheduler: Scheduler) -> None:
        """Take what there is now."""
        self.waiting.set(len(scheduler.waiting))
        self.rows.set(scheduler.n_rows)
        self.free.set(scheduler.n_free_slots)

    def text(self) -> bytes:
        """All of it, in Prometheus's text format."""
        return generate_latest(self.registry)
