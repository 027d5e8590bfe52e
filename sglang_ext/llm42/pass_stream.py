"""Where canonical passes run, and how the host learns that one has ended.

On a CPU a pass runs within the step that launches it. On a GPU it runs on a stream of its own beside decode,
and a later step finds its result on the host. What orders the two streams:

- Passes are ordered among themselves; where decode waits for prompts, one may be launched behind another.
- A pass starts after everything that was launched before it: the decode steps that wrote its candidates and
  the keys and values in the slots that it overwrites.
- Later forwards start once the last pass has read SGLang's tables and the candidates (not once it has ended),
  so the scheduler, which waits for the forward stream, may change these tables again.
- Decode beside a pass may read slots that the pass is half through overwriting. They belong to candidates:
  what follows from them is verified itself. Committed positions are complete, because they are committed only
  when the host has seen the end of the pass that computed them. The pass reads nothing that decode writes:
  its rows read canonical keys and values of earlier passes, on the same stream, and their own.
- A slot that a pass may still read or write must not get a new owner who writes to it: :class:`SlotGuard`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

import torch

if TYPE_CHECKING:
    from contextlib import AbstractContextManager


class Results(Protocol):
    """Token ids that a pass decides, on their way to the host."""

    def ready(self) -> bool:
        """Whether :meth:`read` would return at once."""

    def read(self) -> list[list[int]]:
        """The token ids; waits for the pass."""


class PassStream(Protocol):
    """Where canonical passes run.

    Attributes:
        beside: whether decode goes on meanwhile, so that a pass is looked after at every step until it has
        ended.
    """

    beside: bool

    def launching(self) -> AbstractContextManager[None]:
        """What is computed inside belongs to the next pass."""

    def results(self, tensors: Sequence[torch.Tensor]) -> Results:
        """Start the way of the pass's results to the host; inside of :meth:`launching`."""


class HostResults:
    """Results on a CPU."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._tensors = tensors

    def ready(self) -> bool:
        """Always."""
        return True

    def read(self) -> list[list[int]]:
        """The token ids."""
        return [tensor.tolist() for tensor in self._tensors]


class HostPasses:
    """Passes on a CPU."""

    beside = False

    def launching(self) -> AbstractContextManager[None]:
        """Nothing to prepare."""
        return nullcontext()

    def results(self, tensors: Sequence[torch.Tensor]) -> Results:
        """The tensors themselves."""
        return HostResults(tensors)


class DeviceResults:
    """Results of a pass on a GPU.

    Args:
        tensors: on the device, computed on the current stream.

    Attributes:
        ended: recorded when the pass, all that belongs to it and the copies have ended.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        # The originals live as long as the copies are under way.
        self._tensors = list(tensors)
        self._copies = [
            torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
            for tensor in self._tensors
        ]
        self.ended = torch.cuda.Event()
        self.ended.record()

    def ready(self) -> bool:
        """Whether the pass has ended."""
        return self.ended.query()

    def read(self) -> list[list[int]]:
        """The token ids; waits for the pass, and for nothing else."""
        self.ended.synchronize()
        return [copy.tolist() for copy in self._copies]


class InlinePasses:
    """Passes on a GPU in front of the decode of the step that launches them, on the same stream."""

    beside = False

    def launching(self) -> AbstractContextManager[None]:
        """Nothing to prepare."""
        return nullcontext()

    def results(self, tensors: Sequence[torch.Tensor]) -> Results:
        """Copies in pinned memory."""
        return DeviceResults(tensors)


class PassesBeside:
    """Passes on a stream of their own, which orders them: their buffers are the same.

    Args:
        stream: theirs.
        inputs_read: recorded by a pass when it has read what others may then change.
    """

    beside = True

    def __init__(self, stream: torch.cuda.Stream, inputs_read: torch.cuda.Event) -> None:
        self.stream = stream
        self._inputs_read = inputs_read

    @contextmanager
    def launching(self) -> Iterator[None]:
        """Run on the stream for passes, after what the current stream has been given so far."""
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            yield
        current.wait_event(self._inputs_read)

    def results(self, tensors: Sequence[torch.Tensor]) -> Results:
        """Copies in pinned memory."""
        return DeviceResults(tensors)


def pass_stream(canonical_pass: Any, beside: bool) -> PassStream:
    """Where ``canonical_pass`` runs.

    Args:
        canonical_pass: the server's.
        beside: on a GPU: beside decode rather than in front of it.
    """
    if torch.device(canonical_pass.device).type == "cpu":
        return HostPasses()
    if not beside:
        return InlinePasses()
    return PassesBeside(canonical_pass.stream, canonical_pass.inputs_read)


class SlotGuard:
    """Keeps KV slots that a pass under way may use from new owners.

    A request may end, be retracted, or be re-pointed to the radix cache's slots while a pass carries one of
    its segments. Its slots are free at once, as SGLang's accounting wants it, and the pass goes on to read
    and write them. The rule: no forward that may have been given one of them starts before the pass has
    ended; the wait is the device's, not the host's. The next forwards are not such, for SGLang's allocators
    take from the front of the free list and free at its end: only when as many slots have been given away as
    were free before can it be a forward's turn. (With pages of several slots they free at the front: there
    the next forward that takes slots waits.) A forward that computes prompts waits always: SGLang may have
    emptied its cache in between, which sorts the list, and after that a prompt comes first. (It gains nothing
    beside a pass anyway: both are bound by compute.) Canonical passes are ordered among themselves.

    Args:
        allocator: SGLang's allocator of KV slots.
    """

    def __init__(self, allocator: Any) -> None:
        self._allocator = allocator
        self._pass: DeviceResults | None = None
        self._left = 0

    def freeing(self, under_way: Results) -> None:
        """Slots that the pass ``under_way`` may use are about to be freed."""
        if not isinstance(under_way, DeviceResults) or self._pass is under_way:
            return  # on a CPU passes have ended; slots freed later come into use later
        left = len(self._allocator.free_pages) if self._allocator.page_size == 1 else 0
        # What was freed under an earlier pass that has not ended comes into use before.
        self._left = left if self._pass is None or self._pass.ready() else min(left, self._left)
        self._pass = under_way

    def taken(self, slots: int) -> None:
        """``slots`` KV slots were given to requests whose forward is not the next one."""
        self._left -= slots

    def before_forward(self, slots: int, prompts: bool) -> None:
        """Let the current stream wait if its next forward may write to slots that were freed.

        Args:
            slots: KV slots given to the forward's batch; each may have taken a page.
            prompts: whether it computes prompts.
        """
        if self._pass is None:
            return
        self.taken(slots)
        if self._pass.ready():
            self._pass = None
        elif prompts or self._left < 0:
            torch.cuda.current_stream().wait_event(self._pass.ended)
            self._pass = None
