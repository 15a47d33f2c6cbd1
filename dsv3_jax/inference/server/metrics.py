"""What the server did, in Prometheus' text format."""

import dataclasses

from dsv3_jax.inference.server.worker import Worker


@dataclasses.dataclass
class RequestCounts:
    """Requests by status, and how long they took."""

    by_status: dict[int, int] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    first_token_seconds: float = 0.0
    first_tokens: int = 0

    def add(self, status: int, seconds: float) -> None:
        """One more request is done."""
        self.by_status[status] = self.by_status.get(status, 0) + 1
        self.seconds += seconds

    def add_first_token(self, seconds: float) -> None:
        """A request got its first token."""
        self.first_tokens += 1
        self.first_token_seconds += seconds


def render(worker: Worker, requests: RequestCounts) -> str:
    """All of it."""
    engine, counts = worker.engine, worker.engine.counts
    lines: list[str] = []

    def tell(name: str, kind: str, what: str, *values: tuple[str, int | float]) -> None:
        lines.extend((f"# HELP dsv3_{name} {what}", f"# TYPE dsv3_{name} {kind}"))
        lines.extend(f"dsv3_{name}{labels} {value}" for labels, value in values)

    for name, what, value in (
        ("prompt_tokens_total", "Tokens of prompts.", counts.prompt_tokens),
        ("shared_tokens_total", "Tokens of prompts found in the cache.", counts.shared_tokens),
        ("generated_tokens_total", "Tokens written.", counts.written_tokens),
        ("steps_total", "Steps of the engine.", counts.steps),
        ("preemptions_total", "Sequences set aside for want of pages.", counts.preemptions),
        ("drafts_proposed_total", "Drafted tokens that were checked.", counts.proposed),
        ("drafts_accepted_total", "Drafted tokens that counted.", counts.accepted),
    ):
        tell(name, "counter", what, ("", value))
    finished = [(f'{{reason="{reason}"}}', value) for reason, value in counts.finished.items()]
    tell("sequences_finished_total", "counter", "Sequences by how they ended.", *finished)
    by_status = [(f'{{status="{status}"}}', value) for status, value in sorted(requests.by_status.items())]
    tell("requests_total", "counter", "Requests to /v1 by status.", *by_status)
    total = sum(requests.by_status.values())
    for name, what, seconds, count in (
        ("request_seconds", "Seconds a request took.", requests.seconds, total),
        ("first_token_seconds", "Seconds to the first token.", requests.first_token_seconds, requests.first_tokens),
    ):
        lines.extend((f"# HELP dsv3_{name} {what}", f"# TYPE dsv3_{name} summary"))
        lines.extend((f"dsv3_{name}_sum {seconds:.6f}", f"dsv3_{name}_count {count}"))
    running, waiting = len(engine.scheduler.running), len(engine.scheduler.waiting)
    for name, what, value in (
        ("running", "Sequences that run.", running),
        ("waiting", "Sequences in line.", waiting),
        ("open", "Sequences that a request waits for.", worker.open),
        ("pages_held", "Pages of the cache that a sequence holds.", engine.blocks.held),
        ("pages", "Pages of the cache.", engine.blocks.held + engine.blocks.free),
    ):
        tell(name, "gauge", what, ("", value))
    return "\n".join(lines) + "\n"
