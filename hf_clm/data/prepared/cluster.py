"""Makes blocks on many cores or machines as Ray tasks, and returns them in the order of the files.

    this process    reads chunks --> task --> task --> ...        writes the results, in order
    workers                           |  label, certify  |

If a worker dies, its task runs again. Workers receive the data themselves and need no shared folder.
"""

import logging
import math
import os
import socket
from collections import Counter, deque
from collections.abc import Generator, Iterable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from hf_clm.data.prepared.block import Block, BlockMaker
from hf_clm.data.prepared.chunks import RawBlock
from hf_clm.errors import EnvironmentFault, UserError

AHEAD = 3  # blocks per core in flight: keeps the cores busy with little memory
CONNECT_SECONDS = 10.0
RETRIES = 3  # if the worker of a task dies


@dataclass
class RayBlocks:
    """Makes blocks on a Ray cluster or on all cores of this machine.

    Args:
        address: ``local``, ``auto``, or the address of a cluster ("ray://head:10001", "10.0.0.1:6379").

    ``made``: number of blocks by worker (host name and process id).
    """

    address: str
    made: Counter[str] = field(default_factory=Counter)

    def __call__(self, maker: BlockMaker, blocks: Iterable[RawBlock]) -> Generator[Block, None, None]:
        """Yields the blocks in order. Raises the errors of the tasks, and EnvironmentFault if Ray fails."""
        ray = self._connect()
        from ray.exceptions import RayError, RayTaskError

        make = ray.remote(max_retries=RETRIES, num_cpus=1)(_make)
        shared = ray.put(maker)
        waiting: deque[Any] = deque()
        limit = AHEAD * max(1, math.floor(ray.cluster_resources().get("CPU", 1)))
        try:
            for raw in blocks:
                waiting.append(make.remote(shared, raw))
                if len(waiting) >= limit:
                    yield self._take(ray.get(waiting.popleft()))
            while waiting:
                yield self._take(ray.get(waiting.popleft()))
        except RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise error.cause from None
            raise
        except RayError as error:
            what = f"Ray failed: {str(error).splitlines()[0]}"
            fix = "see Ray's logs"
            raise EnvironmentFault(what, where="--ray", got=self.address, fix=fix) from error
        finally:
            for task in waiting:
                ray.cancel(task, force=True)

    def to_lines(self) -> list[str]:
        """Returns a line for each worker with its number of blocks."""
        return [f"{'ray':<10}{worker}: {count:,} blocks" for worker, count in sorted(self.made.items())]

    def _take(self, result: tuple[str, Block]) -> Block:
        worker, block = result
        self.made[worker] += 1
        return block

    def _connect(self) -> Any:
        """Returns the ray module. Raises EnvironmentFault if it is not installed or no cluster responds."""
        try:
            import ray
        except ImportError as error:
            fix = "pip install 'hf_clm[ray]'"
            raise EnvironmentFault("needs the package ray", where="--ray", fix=fix) from error
        if ray.is_initialized():
            return ray

        # one thread for each task's tokenizer, since there are as many tasks as cores
        threads = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
        try:
            _require_answer(self.address)
            level = logging.ERROR
            runtime = {"env_vars": threads}
            ray.init(self.address, log_to_driver=False, logging_level=level, runtime_env=runtime)
        except (OSError, RuntimeError, ValueError) as error:
            what = f"no Ray cluster responds: {str(error).splitlines()[0]}"
            fix = "start one: ray start --head"
            raise EnvironmentFault(what, where="--ray", got=self.address, fix=fix) from error
        return ray


def _require_answer(address: str) -> None:
    """Raises OSError if nothing listens at the host and port; Ray would retry for minutes."""
    url = urlsplit(address if "://" in address else f"//{address}")
    if url.hostname and url.port:
        socket.create_connection((url.hostname, url.port), timeout=CONNECT_SECONDS).close()


def _make(maker: BlockMaker, raw: RawBlock) -> tuple[str, Block]:
    """Runs as a task; returns the worker and the block."""
    return f"{socket.gethostname()} process {os.getpid()}", maker.make(raw)
