"""The queue of a server: answers are generated in the order in which they were asked for, several at once.

ask --> waiting (bounded) --> a batch, in one thread --> pieces of text --> each its own ticket
"""

import asyncio
import copy
import time
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

from hf_clm.errors import UserError
from hf_clm.generation.load import LoadedRun
from hf_clm.generation.protocol import ApiError, Counts
from hf_clm.generation.stream import Answer, stream_answers
from hf_clm.model import max_positions

STOPPING = ApiError(503, "the server is stopping", code="server_stopping")


class Ticket:
    """One place in the queue; iterating over it gives the pieces of its answer as they come."""

    def __init__(self, to_answer: Callable[[Callable[[str], None], Callable[[], None]], Answer]):
        loop = asyncio.get_running_loop()  # the answer is generated in another thread

        def put(piece: str | None) -> None:
            loop.call_soon_threadsafe(self._pieces.put_nowait, piece)

        self._pieces: asyncio.Queue[str | None] = asyncio.Queue()
        self._error: ApiError | None = None
        self._watcher: asyncio.Task[None] | None = None
        self.answer = to_answer(put, lambda: put(None))

    def watch(self, leaving: Coroutine[Any, Any, None]) -> None:
        """Runs ``leaving``, which cancels the answer where its client leaves, until the answer has ended."""
        self._watcher = asyncio.create_task(leaving)

    async def __aiter__(self) -> AsyncIterator[str]:
        """Raises ApiError where the answer failed or was cancelled."""
        while (piece := await self._pieces.get()) is not None:
            yield piece
        if self._watcher:
            self._watcher.cancel()
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
        self._batch_size, self._max_waiting = batch_size, max_waiting
        self._has_work = asyncio.Event()
        self._is_closing = False
        self.waiting: deque[Ticket] = deque()
        self.batch: list[Ticket] = []
        self.counts: Counts = defaultdict(float)

    def check_alive(self) -> None:
        """Raises ApiError where the server is stopping, or has stopped at a fault of its own."""
        if self._is_closing:
            raise STOPPING

    def check_room(self) -> None:
        """Raises ApiError where nothing is taken: as ``check_alive``, or where the queue is full."""
        self.check_alive()
        if len(self.waiting) >= self._max_waiting:
            what = f"{len(self.waiting)} requests are waiting already; try again later"
            raise ApiError(429, what, code="queue_full")

    def submit(self, ticket: Ticket) -> None:
        """Queues it. Raises ApiError where the queue is full."""
        self.check_room()
        self.waiting.append(ticket)
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
        try:
            await asyncio.to_thread(stream_answers, self._model, self._tokenizer, answers=answers)
        except (RuntimeError, ValueError, UserError) as error:  # out of memory, most of all
            what = f"the generation failed: {str(error).splitlines()[0]}"
            for ticket in self.batch:
                ticket.fail(ApiError(500, what, code="generation_failed"))
        self.counts["hf_clm_generation_seconds_total"] += time.monotonic() - started
        self.counts["hf_clm_batches_total"] += 1
        for answer in answers:
            self.counts["hf_clm_prompt_tokens_total"] += len(answer.prompt_ids)
            self.counts["hf_clm_generated_tokens_total"] += answer.tokens
            self.counts[f'hf_clm_answers_total{{finish="{answer.finish or "cancelled"}"}}'] += 1
        self.batch = []

    def _next_batch(self) -> list[Ticket]:
        """The first that wait, as many as fit beside each other into the model's positions."""
        batch: list[Ticket] = []
        while self.waiting and len(batch) < self._batch_size:
            answers = [ticket.answer for ticket in [*batch, self.waiting[0]]]
            longest = max(len(answer.prompt_ids) for answer in answers)
            room = longest + max(answer.max_new_tokens for answer in answers)
            if batch and self._limit is not None and room > self._limit:
                break
            batch.append(self.waiting.popleft())
        return batch
