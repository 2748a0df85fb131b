"""What a server counts and measures, in the text format of Prometheus."""

from collections import defaultdict
from collections.abc import Mapping

BUCKETS_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
# The name of each metric -> its help.
COUNTERS = {
    "hf_clm_replies_total": "HTTP replies, by status.",
    "hf_clm_answers_total": "Answers, by the reason why they ended.",
    "hf_clm_batches_total": "Batches of answers that were generated together.",
    "hf_clm_prompt_tokens_total": "Tokens of the prompts that were read.",
    "hf_clm_generated_tokens_total": "Tokens of the answers.",
    "hf_clm_generation_seconds_total": "Seconds in which at least one answer was generated.",
}
HISTOGRAMS = {
    "hf_clm_answer_seconds": "Seconds from the request for an answer to its end, of answers that ended.",
    "hf_clm_queue_seconds": "Seconds that an answer waited in the queue before it was generated.",
    "hf_clm_first_token_seconds": "Seconds from the request for an answer to its first text.",
}
GAUGES = {
    "hf_clm_waiting": "Answers in the queue.",
    "hf_clm_generating": "Answers that are generated now.",
}


class Metrics:
    """Counters and histograms since the server began."""

    def __init__(self) -> None:
        self._counts: dict[str, float] = defaultdict(float)
        self._observed: dict[str, list[float]] = {
            name: [0] * (len(BUCKETS_SECONDS) + 1) for name in HISTOGRAMS
        }
        self._sums = dict.fromkeys(HISTOGRAMS, 0.0)

    def count(self, name: str, value: float = 1, **labels: str) -> None:
        """Adds to a counter."""
        assert name in COUNTERS
        shown = ",".join(f'{key}="{label}"' for key, label in labels.items())
        self._counts[f"{name}{{{shown}}}" if shown else name] += value

    def observe(self, name: str, seconds: float) -> None:
        """Adds a measurement to a histogram."""
        bucket = sum(seconds > bound for bound in BUCKETS_SECONDS)
        self._observed[name][bucket] += 1
        self._sums[name] += seconds

    def to_text(self, gauges: Mapping[str, int]) -> str:
        """All of them, as ``GET /metrics`` shows them."""
        lines: list[str] = []
        for name, help in COUNTERS.items():
            values = {
                key: value for key, value in sorted(self._counts.items()) if key.partition("{")[0] == name
            }
            lines += _head(name, help, "counter")
            lines += [f"{key} {value}" for key, value in values.items()]
        for name, help in HISTOGRAMS.items():
            lines += _head(name, help, "histogram")
            total = 0.0
            for bound, count in zip([*BUCKETS_SECONDS, "+Inf"], self._observed[name], strict=True):
                total += count
                lines.append(f'{name}_bucket{{le="{bound}"}} {total:g}')
            lines += [f"{name}_sum {self._sums[name]}", f"{name}_count {total:g}"]
        for name, help in GAUGES.items():
            lines += [*_head(name, help, "gauge"), f"{name} {gauges[name]}"]
        return "\n".join(lines) + "\n"


def _head(name: str, help: str, kind: str) -> list[str]:
    return [f"# HELP {name} {help}", f"# TYPE {name} {kind}"]
