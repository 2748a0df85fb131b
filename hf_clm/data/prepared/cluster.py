"""Blocks made on many cores or machines, as tasks of Ray; they come back in the order of the files.

    this process    reads chunks --> task --> task --> ...        writes what comes back, in order
    workers                           |  label, certify  |

A task whose worker dies is done again. Nothing but the data themselves moves: workers need no shared folder.
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

AHEAD = 3  # blocks for each core that wait or are made: enough to keep it busy, little memory
CONNECT_SECONDS = 10.0
RETRIES = 3  # of a task whose worker died


@dataclass
class RayBlocks:
    """Makes blocks on a Ray cluster, or on all cores of this machine.

    Args:
        address: ``local``, ``auto``, or that of a cluster ("ray://head:10001", "10.0.0.1:6379").

    ``made``: how many blocks each worker made, by the address of its machine and its process.
    """

    address: str
    made: Counter[str] = field(default_factory=Counter)

    def __call__(self, maker: BlockMaker, blocks: Iterable[RawBlock]) -> Generator[Block, None, None]:
        """The blocks in their order. Raises what making one raises, EnvironmentFault for a lost cluster."""
        ray = self._connect()
        from ray.exceptions import RayError, RayTaskError

        make = ray.remote(max_retries=RETRIES, num_cpus=1)(_make)
        shared = ray.put(maker)
        waiting: deque[Any] = deque()
        most = AHEAD * max(1, math.floor(ray.cluster_resources().get("CPU", 1)))
        try:
            for raw in blocks:
                waiting.append(make.remote(shared, raw))
                if len(waiting) >= most:
                    yield self._take(ray.get(waiting.popleft()))
            while waiting:
                yield self._take(ray.get(waiting.popleft()))
        except RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise error.cause from None
            raise
        except RayError as error:
            what = f"Ray gave up: {str(error).splitlines()[0]}"
            raise EnvironmentFault(
                what, where="--ray", got=self.address, fix="see the logs of Ray"
            ) from error
        finally:
            for task in waiting:
                ray.cancel(task, force=True)

    def to_lines(self) -> list[str]:
        """How many blocks each worker made."""
        return [f"{'ray':<10}{worker}: {count:,} blocks" for worker, count in sorted(self.made.items())]

    def _take(self, found: tuple[str, Block]) -> Block:
        worker, block = found
        self.made[worker] += 1
        return block

    def _connect(self) -> Any:
        """Raises EnvironmentFault where Ray is not installed, or the cluster does not answer."""
        try:
            import ray
        except ImportError as error:
            fix = "pip install 'hf_clm[ray]'"
            raise EnvironmentFault("needs the package ray", where="--ray", fix=fix) from error
        if ray.is_initialized():
            return ray

        # one thread for the tokenizer of each task: there are as many tasks as cores
        threads = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
        try:
            _require_answer(self.address)
            level = logging.ERROR
            runtime = {"env_vars": threads}
            ray.init(self.address, log_to_driver=False, logging_level=level, runtime_env=runtime)
        except (OSError, RuntimeError, ValueError) as error:
            what, fix = f"no Ray cluster answers: {str(error).splitlines()[0]}", "start one: ray start --head"
            raise EnvironmentFault(what, where="--ray", got=self.address, fix=fix) from error
        return ray


def _require_answer(address: str) -> None:
    """Raises OSError where nothing listens at a host and port: Ray would try for minutes."""
    found = urlsplit(address if "://" in address else f"//{address}")
    if found.hostname and found.port:
        socket.create_connection((found.hostname, found.port), timeout=CONNECT_SECONDS).close()


def _make(maker: BlockMaker, raw: RawBlock) -> tuple[str, Block]:
    """The task: one block, and who made it."""
    return f"{socket.gethostname()} process {os.getpid()}", maker.make(raw)
