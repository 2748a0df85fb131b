"""The queue of a server: answers are generated in the order in which they were asked for, several at once.

ask --> waiting (bounded) --> a batch, in one thread --> pieces of text --> each its own ticket
"""

import asyncio
import copy
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial

from hf_clm.errors import UserError
from hf_clm.generation.load import LoadedRun
from hf_clm.generation.monitoring import Metrics
from hf_clm.generation.padding import probe
from hf_clm.generation.protocol import ApiError
from hf_clm.generation.stream import Answer, stream_answers
from hf_clm.model.load import max_positions

STOPPING = ApiError(503, "the server is stopping", code="server_stopping")


class Ticket:
    """One place in the queue; iterating over it gives the pieces of its answer as they come."""

    def __init__(self, to_answer: Callable[..., Answer]):
        """``to_answer`` is given ``emit`` and ``on_end`` of an Answer."""
        loop = asyncio.get_running_loop()  # the answer is generated in another thread

        def put(piece: str | None) -> None:
            if self.first_at is None and piece:
                self.first_at = time.monotonic()
            loop.call_soon_threadsafe(self._pieces.put_nowait, piece)

        def end() -> None:
            self.ended_at = time.monotonic()
            put(None)

        self._pieces: asyncio.Queue[str | None] = asyncio.Queue()
        self._error: ApiError | None = None
        self.asked_at = time.monotonic()
        self.first_at: float | None = None  # its first text
        self.ended_at: float | None = None
        self.answer = to_answer(emit=put, on_end=end)

    async def __aiter__(self) -> AsyncIterator[str]:
        """Raises ApiError where the answer failed or was cancelled."""
        while (piece := await self._pieces.get()) is not None:
            yield piece
        if self._error:
            raise self._error

    def fail(self, error: ApiError) -> None:
        """Ends it with an error, unless its answer has ended."""
        if not self.answer.is_done:
            self._error, self.answer.is_cancelled = error, True
            self._pieces.put_nowait(None)


class Worker:
    """Generates for tickets; everything but the generation itself runs in the event loop's thread."""

    def __init__(self, run: LoadedRun, *, batch_size: int, max_waiting: int):
        self._model, self._limit = run.model, max_positions(run.model.config)
        self._tokenizer = copy.deepcopy(run.tokenizer)  # another thread reads prompts with the run's own
        self._probe = probe(run.model, run.tokenizer)
        self.batch_size = batch_size if self._probe.takes_batches else 1
        self.max_waiting = max_waiting
        self._has_work = asyncio.Event()
        self._is_closing = False
        self.waiting: deque[Ticket] = deque()
        self.batch: list[Ticket] = []
        self.metrics = Metrics()

    def check_alive(self) -> None:
        """Raises ApiError where the server is stopping, or has stopped at a fault of its own."""
        if self._is_closing:
            raise STOPPING

    def check_room(self, answers: int = 1) -> None:
        """Raises ApiError where nothing is taken: as ``check_alive``, or where the queue is full."""
        self.check_alive()
        if answers > self.max_waiting:
            what = f"a request may have {self.max_waiting} prompts; got {answers}"
            raise ApiError(400, what, code="too_many_prompts", param="prompt")
        if len(self.waiting) + answers > self.max_waiting:
            what = f"{len(self.waiting)} requests are waiting already; try again later"
            raise ApiError(429, what, code="queue_full")

    def submit(self, tickets: Sequence[Ticket]) -> None:
        """Queues all of them, or none. Raises ApiError where the queue is full."""
        self.check_room(len(tickets))
        self.waiting.extend(tickets)
        self._has_work.set()

    def cancel(self, ticket: Ticket) -> None:
        """Ends its generation at the next token, or takes it out of the queue."""
        ticket.fail(ApiError(499, "the client has left", code="client_left"))
        if ticket in self.waiting:
            self.waiting.remove(ticket)

    async def run(self) -> None:
        """Generates until ``close``."""
        try:
            while not self._is_closing:
                await self._has_work.wait()
                self.batch = self._next_batch()
                if self.batch:
                    await self._generate()
                if not self.waiting:
                    self._has_work.clear()
        finally:
            self.close()  # after a fault of our own nobody waits for ever

    def close(self) -> None:
        """Refuses what comes and ends what is under way; ``run`` then returns."""
        self._is_closing = True
        for ticket in [*self.waiting, *self.batch]:
            ticket.fail(STOPPING)
        self.waiting.clear()
        self._has_work.set()

    async def _generate(self) -> None:
        answers = [ticket.answer for ticket in self.batch]
        started = time.monotonic()
        for ticket in self.batch:
            self.metrics.observe("hf_clm_queue_seconds", started - ticket.asked_at)
        try:
            caches = self._probe.takes_cache
            generation = partial(stream_answers, answers=answers, with_cache=caches)
            await asyncio.to_thread(generation, self._model, self._tokenizer)
        except (RuntimeError, ValueError, UserError) as error:  # out of memory, most of all
            what = f"the generation failed: {str(error).splitlines()[0]}"
            for ticket in self.batch:
                ticket.fail(ApiError(500, what, code="generation_failed"))
        self.metrics.count("hf_clm_generation_seconds_total", time.monotonic() - started)
        self.metrics.count("hf_clm_batches_total")
        for ticket in self.batch:
            self._measure(ticket)
        self.batch = []

    def _measure(self, ticket: Ticket) -> None:
        answer = ticket.answer
        self.metrics.count("hf_clm_prompt_tokens_total", len(answer.prompt_ids))
        self.metrics.count("hf_clm_generated_tokens_total", answer.tokens)
        self.metrics.count("hf_clm_answers_total", finish=answer.finish or "cancelled")
        if ticket.first_at is not None:
            self.metrics.observe("hf_clm_first_token_seconds", ticket.first_at - ticket.asked_at)
        if ticket.ended_at is not None:
            self.metrics.observe("hf_clm_answer_seconds", ticket.ended_at - ticket.asked_at)

    def _next_batch(self) -> list[Ticket]:
        """The first that wait, as many as fit beside each other into the model's positions."""
        batch: list[Ticket] = []
        while self.waiting and len(batch) < self.batch_size:
            answers = [ticket.answer for ticket in [*batch, self.waiting[0]]]
            longest = max(len(answer.prompt_ids) for answer in answers)
            room = longest + max(answer.max_new_tokens for answer in answers)
            if batch and self._limit is not None and room > self._limit:
                break
            batch.append(self.waiting.popleft())
        return batch
