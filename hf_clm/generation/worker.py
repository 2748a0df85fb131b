"""The server's queue: answers are generated in the order of their requests, in batches.

submit --> waiting (bounded) --> batch, generated in one thread --> pieces of text --> ticket of each answer
"""

import asyncio
import copy
import time
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from hf_clm.errors import UserError
from hf_clm.generation.load import LoadedRun
from hf_clm.generation.padding import probe
from hf_clm.generation.protocol import ApiError
from hf_clm.generation.stream import Answer, stream_answers
from hf_clm.model.load import max_positions

STOPPING = ApiError(503, "the server is stopping", code="server_stopping")
BUCKETS_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
# The name of each metric, without the prefix hf_clm_ -> its type and help.
SERVER_METRICS = {
    "replies_total": ("counter", "HTTP replies, by status."),
    "answers_total": ("counter", "Answers, by finish reason."),
    "batches_total": ("counter", "Generated batches."),
    "prompt_tokens_total": ("counter", "Prompt tokens."),
    "generated_tokens_total": ("counter", "Generated tokens, without stop tokens."),
    "generation_seconds_total": ("counter", "Seconds spent generating."),
    "answer_seconds": ("histogram", "Seconds from the request to the end of the answer."),
    "queue_seconds": ("histogram", "Seconds that an answer waited in the queue."),
    "first_token_seconds": ("histogram", "Seconds from the request to the first text of the answer."),
    "waiting": ("gauge", "Answers in the queue."),
    "generating": ("gauge", "Answers being generated."),
}


class ServerMetrics:
    """Counters and histograms since the server started."""

    def __init__(self) -> None:
        self._values: defaultdict[str, float] = defaultdict(float)  # by Prometheus name, including labels

    def count(self, name: str, value: float = 1, **labels: str) -> None:
        """Adds to a counter."""
        suffix = ",".join(f'{key}="{label}"' for key, label in labels.items())
        self._values[f"{name}{{{suffix}}}" if suffix else name] += value

    def observe(self, name: str, seconds: float) -> None:
        """Adds a measurement to a histogram."""
        for bound in (*BUCKETS_SECONDS, "+Inf"):
            self.count(f"{name}_bucket", seconds <= float(bound), le=str(bound))
        self.count(f"{name}_sum", seconds)
        self.count(f"{name}_count")

    def to_text(self, gauges: Mapping[str, int]) -> str:
        """Returns all metrics in the text format of Prometheus."""
        lines: list[str] = []
        for name, (kind, help) in SERVER_METRICS.items():
            lines += [f"# HELP hf_clm_{name} {help}", f"# TYPE hf_clm_{name} {kind}"]
            values = {**self._values, **gauges}.items()
            lines += [f"hf_clm_{key} {value}" for key, value in values if key.startswith(name)]
        return "\n".join(lines) + "\n"


@dataclass(eq=False)
class Ticket(Answer):
    """An answer in the queue. Iterating over it yields its text as it is generated."""

    def __post_init__(self) -> None:
        self._pieces: asyncio.Queue[str | None] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()  # the answer is generated in another thread
        self._error: ApiError | None = None
        self.asked_at, self.first_at, self.ended_at = time.monotonic(), 0.0, 0.0
        self.emit = self._put

    async def __aiter__(self) -> AsyncIterator[str]:
        """Yields pieces of text. Raises ApiError if the answer failed or was cancelled."""
        while (piece := await self._pieces.get()) is not None:
            yield piece
        if self._error:
            raise self._error

    async def wait(self) -> None:
        """Waits for the end. Raises ApiError if the answer failed or was cancelled."""
        async for _ in self:
            pass

    def close(self, reason: str) -> None:
        """Sets why and when the answer ended."""
        super().close(reason)
        self.ended_at = time.monotonic()
        self._put(None)

    def fail(self, error: ApiError) -> None:
        """Ends the answer with an error, unless it has already ended."""
        if not self.is_done:
            self._error, self.is_cancelled = error, True
            self._pieces.put_nowait(None)

    def _put(self, piece: str | None) -> None:
        self.first_at = self.first_at or (time.monotonic() if piece else 0.0)
        self._loop.call_soon_threadsafe(self._pieces.put_nowait, piece)


class Worker:
    """Generates queued answers. Only the generation itself runs outside the event loop's thread."""

    def __init__(self, run: LoadedRun, *, batch_size: int, max_waiting: int):
        self._model, self._limit = run.model, max_positions(run.model.config)
        self._tokenizer = copy.deepcopy(run.tokenizer)  # another thread uses the original
        self._probe = probe(run.model, run.tokenizer)
        self.batch_size = batch_size if self._probe.takes_batches else 1
        self.max_waiting = max_waiting
        self._has_work = asyncio.Event()
        self._is_closing = False
        self.waiting: deque[Ticket] = deque()
        self.batch: list[Ticket] = []
        self.metrics = ServerMetrics()

    def check_alive(self) -> None:
        """Raises ApiError if the server is stopping, or has stopped because of an error."""
        if self._is_closing:
            raise STOPPING

    def check_room(self, answers: int = 1) -> None:
        """Raises ApiError if new answers cannot be queued: as ``check_alive``, or if the queue is full."""
        self.check_alive()
        if answers > self.max_waiting:
            what = f"a request may have at most {self.max_waiting} prompts; got {answers}"
            raise ApiError(400, what, code="too_many_prompts", param="prompt")
        if len(self.waiting) + answers > self.max_waiting:
            what = f"the queue is full ({len(self.waiting)} waiting); try again later"
            raise ApiError(429, what, code="queue_full")

    def submit(self, tickets: Sequence[Ticket]) -> None:
        """Queues all tickets or none. Raises ApiError if the queue is full."""
        self.check_room(len(tickets))
        self.waiting.extend(tickets)
        self._has_work.set()

    def cancel(self, tickets: Sequence[Ticket]) -> None:
        """Removes tickets from the queue, or ends their generation at the next token."""
        for ticket in tickets:
            ticket.fail(ApiError(499, "the client has disconnected", code="client_left"))
            if ticket in self.waiting:
                self.waiting.remove(ticket)

    async def run(self) -> None:
        """Generates until ``close`` is called."""
        try:
            while not self._is_closing:
                await self._has_work.wait()
                self.batch = self._next_batch()
                if self.batch:
                    await self._generate()
                if not self.waiting:
                    self._has_work.clear()
        finally:
            self.close()  # also after a bug, so that clients do not wait forever

    def close(self) -> None:
        """Rejects new requests and ends pending ones; ``run`` then returns."""
        self._is_closing = True
        for ticket in [*self.waiting, *self.batch]:
            ticket.fail(STOPPING)
        self.waiting.clear()
        self._has_work.set()

    async def _generate(self) -> None:
        started = time.monotonic()
        for ticket in self.batch:
            self.metrics.observe("queue_seconds", started - ticket.asked_at)
        try:
            together = partial(stream_answers, answers=self.batch, with_cache=self._probe.takes_cache)
            await asyncio.to_thread(together, self._model, self._tokenizer)
        except (RuntimeError, ValueError, UserError) as error:  # most likely out of memory
            what = f"generation failed: {str(error).splitlines()[0]}"
            for ticket in self.batch:
                ticket.fail(ApiError(500, what, code="generation_failed"))
        self.metrics.count("generation_seconds_total", time.monotonic() - started)
        self.metrics.count("batches_total")
        for ticket in self.batch:
            self._measure(ticket)
        self.batch = []

    def _measure(self, ticket: Ticket) -> None:
        self.metrics.count("prompt_tokens_total", len(ticket.prompt_ids))
        self.metrics.count("generated_tokens_total", len(ticket.ids))
        self.metrics.count("answers_total", finish=ticket.finish or "cancelled")
        if ticket.first_at:
            self.metrics.observe("first_token_seconds", ticket.first_at - ticket.asked_at)
        if ticket.ended_at:
            self.metrics.observe("answer_seconds", ticket.ended_at - ticket.asked_at)

    def _next_batch(self) -> list[Ticket]:
        """Takes the first tickets off the queue, as many as fit into a batch and the model's positions."""
        batch: list[Ticket] = []
        while self.waiting and len(batch) < self.batch_size:
            together = [*batch, self.waiting[0]]
            longest = max(len(ticket.prompt_ids) for ticket in together)
            room = longest + max(ticket.max_new_tokens for ticket in together)
            if batch and self._limit is not None and room > self._limit:
                break
            batch.append(self.waiting.popleft())
        return batch
