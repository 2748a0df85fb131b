"""One buffer for the tensors of a batch, so that a batch takes one transfer instead of seven.

collated   input_ids  labels  position_ids  cu_seq_lens_q  logits_to_keep  shift_labels      seven tensors
buffer     |input_ids..|labels...|position_ids|cu..|logits_to_keep|shift_labels|              one, of bytes
             a worker sends it, pinned memory holds it, and the device receives it
device     input_ids  labels  ...                                              views of the device's buffer
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

ALIGNMENT = 64  # bytes: compiled kernels read tensors that begin at a multiple of 16 without a copy


@dataclass(frozen=True)
class Place:
    """Where a tensor begins in the buffer, in bytes, and how to view it."""

    start: int
    dtype: torch.dtype
    shape: torch.Size

    def view(self, buffer: torch.Tensor) -> torch.Tensor:
        """Returns the tensor as a view of the buffer."""
        stop = self.start + self.shape.numel() * self.dtype.itemsize
        return buffer[self.start : stop].view(self.dtype).view(self.shape)


@dataclass(frozen=True)
class BufferedBatch:
    """A batch on the host. torch's loader calls ``pin_memory``, and accelerate ``to``, like a tensor's.

    buffer  (bytes,) uint8, all tensors of the batch
    places  of each tensor; two names of one tensor share a place
    rest    values of the batch that are not tensors
    """

    buffer: torch.Tensor
    places: dict[str, Place]
    rest: dict[str, object]

    def pin_memory(self) -> "BufferedBatch":
        """Returns the batch in memory that the device can read by itself."""
        return replace(self, buffer=self.buffer.pin_memory())

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> dict[str, Any]:
        """Returns the batch as the collator made it, with the tensors on a device."""
        moved = self.buffer.to(device, non_blocking=non_blocking)
        views = {place: place.view(moved) for place in set(self.places.values())}
        return {**{name: views[place] for name, place in self.places.items()}, **self.rest}


class BufferingCollator:
    """Collates rows with another collator, and copies the tensors of a batch into one buffer.

    Batches that are not mappings, or contain other containers, are returned as they are.
    """

    def __init__(self, collate: Callable[[Sequence[Any]], Any]):
        self.collate = collate

    def __call__(self, rows: Sequence[Any]) -> Any:
        batch = self.collate(rows)
        is_flat = isinstance(batch, Mapping) and not any(
            isinstance(part, Mapping | list | tuple) for part in batch.values()
        )
        return to_buffer(batch) if is_flat else batch


def to_buffer(batch: Mapping[str, Any]) -> BufferedBatch:
    """Copies the tensors of a batch into one buffer."""
    tensors = {name: part for name, part in batch.items() if isinstance(part, torch.Tensor)}
    rest = {name: part for name, part in batch.items() if name not in tensors}
    place_of, size = {}, 0
    for part in tensors.values():
        if id(part) not in place_of:
            place_of[id(part)] = Place(size, part.dtype, part.shape)
            size += -(-part.numel() * part.element_size() // ALIGNMENT) * ALIGNMENT
    buffer = torch.empty(size, dtype=torch.uint8)
    for part in tensors.values():
        place_of[id(part)].view(buffer).copy_(part)
    return BufferedBatch(buffer, {name: place_of[id(part)] for name, part in tensors.items()}, rest)
