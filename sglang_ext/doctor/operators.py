"""Watching the operators of a model in canonical passes: row digests of what goes in and what comes out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from sglang_ext.doctor.digest import combine, row_digests
from sglang_ext.tokenweave.lazy import LazyTensor, PendingAllReduce

if TYPE_CHECKING:
    from sglang.srt.distributed.parallel_state import GroupCoordinator

ATTENTION = "attention"
LOGITS = "lm_head"
ALL_REDUCE = "all-reduce"


@dataclass
class Event:
    """One call of one operator in a pass.

    Attributes:
        operator: its kind, as it stands in the report.
        path: module path, with the layer's number.
        inputs, outputs: int64 ``[rows]``, digest of each row of all tensors that went in and came out; the
            inputs of a collective are those of all tensor-parallel ranks.
        nested: indices of the operators that ran inside it.
        fused: whether it did the all-reduce of its inputs as well (TokenWeave's fused step).
        own_inputs: inputs on this rank alone.
    """

    operator: str
    path: str
    inputs: torch.Tensor
    outputs: torch.Tensor
    nested: list[int] = field(default_factory=list)
    fused: bool = False
    own_inputs: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.own_inputs = self.inputs

    @property
    def collective(self) -> bool:
        """Whether the outputs depend on what went in on other tensor-parallel ranks."""
        return self.fused or self.operator in (ALL_REDUCE, LOGITS)


@dataclass
class _Call:
    """A call under way: digest of its inputs, those of them whose all-reduce was put off, and number of
    events completed before it."""

    inputs: torch.Tensor
    put_off: list[PendingAllReduce]
    first_nested: int


@dataclass
class _Part:
    """What runs by itself in a pass: a half of it, or what is computed for all of its rows.

    The halves of a woven pass take turns within an operator, so each has its own stack of calls.
    """

    rows: int
    events: list[Event] = field(default_factory=list)
    calls: list[_Call] = field(default_factory=list)
    counts: dict[torch.nn.Module, int] = field(default_factory=lambda: defaultdict(int))


class Recorder:
    """Records the operators of ``model`` while :meth:`recording`.

    An all-reduce that TokenWeave puts off is recorded where it is done: within the norm that takes it, or by
    itself. The two halves of a woven pass are recorded as one pass.

    Args:
        rows: rows of a pass; tensors whose first dimension is no multiple of it are not digested.
        group: tensor-parallel group, None for a single rank.
        running_half: the half of the pass that is running, None for what is not cut.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        rows: int,
        group: GroupCoordinator | None = None,
        running_half: Callable[[], int | None] = lambda: None,
    ) -> None:
        self._rows = rows
        self._group = group
        self._running_half = running_half
        self._parts: dict[int | None, _Part] = {}
        self._completed: list[tuple[int | None, int]] = []  # part and index therein
        # A module may stand in several places (layers share their rotary embedding): it is called in order.
        self._paths: dict[torch.nn.Module, list[str]] = defaultdict(list)
        for path, module in model.named_modules(remove_duplicate=False):
            if operator_of(path, module) is not None:
                self._paths[module].append(path)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Hooks are in place inside this context only."""
        handles = []
        for module in self._paths:
            handles.append(module.register_forward_pre_hook(self._before, with_kwargs=True))
            handles.append(module.register_forward_hook(self._after))
        try:
            with self._all_reduce_recorded():
                yield
        finally:
            for handle in handles:
                handle.remove()

    def take(self) -> list[Event]:
        """The events since the last call, in order of completion."""
        events = self._joined()
        self._parts.clear()
        self._completed.clear()
        if self._group is not None and self._group.world_size > 1:
            self._combine_ranks([event for event in events if event.collective])
        return events

    def _joined(self) -> list[Event]:
        """Events of the whole pass: those of the first half, with the rows of the second."""
        events: list[Event] = []
        places: dict[tuple[int | None, int], int] = {}
        for part, index in self._completed:
            if part == 1:
                continue
            event = self._parts[part].events[index]
            nested = [places[part, inner] for inner in event.nested]
            if part == 0:
                event = _join(event, self._second_half()[index])
            places[part, index] = len(events)
            event.nested = nested
            events.append(event)
        return events

    def _second_half(self) -> list[Event]:
        first, second = self._parts[0].events, self._parts[1].events
        if [(e.operator, e.path) for e in first] != [(e.operator, e.path) for e in second]:
            raise RuntimeError("the halves of a canonical pass ran different operators")
        return second

    def _part(self) -> _Part:
        half = self._running_half()
        if half not in self._parts:
            self._parts[half] = _Part(self._rows if half is None else self._rows // 2)
        return self._parts[half]

    def _before(self, module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        self._begin((args, kwargs))

    def _after(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        paths, counts = self._paths[module], self._part().counts
        path = paths[counts[module] % len(paths)]
        counts[module] += 1
        operator = operator_of(path, module)
        assert operator is not None
        self._end(operator, path, output)

    def _begin(self, inputs: Any) -> None:
        # Before the operator runs: some work in place.
        part = self._part()
        put_off = [
            tensor
            for tensor in _tensors(inputs)
            if isinstance(tensor, PendingAllReduce) and not tensor.reduction.done
        ]
        part.calls.append(_Call(_digest(inputs, part.rows), put_off, len(part.events)))

    def _end(self, operator: str, path: str, output: Any) -> None:
        part = self._part()
        call = part.calls.pop()
        nested = list(range(call.first_nested, len(part.events)))
        fused = any(tensor.reduction.taken for tensor in call.put_off)
        if fused:
            operator = f"{ALL_REDUCE} + {operator}"
        self._completed.append((self._running_half(), len(part.events)))
        part.events.append(Event(operator, path, call.inputs, _digest(output, part.rows), nested, fused))

    @contextmanager
    def _all_reduce_recorded(self) -> Iterator[None]:
        group = self._group
        if group is None or group.world_size == 1:
            yield
            return
        original = group.all_reduce

        def all_reduce(input_: torch.Tensor) -> torch.Tensor:
            self._begin(input_)
            output = original(input_)
            if isinstance(output, PendingAllReduce):
                self._part().calls.pop()
                output.reduction.watch(self._record_all_reduce)
                return output
            self._end(ALL_REDUCE, self._place(), output)
            return output

        group.all_reduce = all_reduce
        try:
            yield
        finally:
            del group.all_reduce

    def _record_all_reduce(
        self, all_reduce: Callable[[torch.Tensor], torch.Tensor], partial: torch.Tensor
    ) -> torch.Tensor:
        self._begin(partial)
        output = all_reduce(partial)
        self._end(ALL_REDUCE, self._place(), output)
        return output

    def _place(self) -> str:
        """Where a collective runs: behind the last operator that completed."""
        events = self._part().events
        return f"after {events[-1].path}" if events else "at the start"

    def _combine_ranks(self, events: list[Event]) -> None:
        """Let the inputs of collectives stand for the inputs of all ranks."""
        if not events:
            return
        assert self._group is not None
        own = torch.stack([event.inputs for event in events])
        of_ranks = [torch.empty_like(own) for _ in range(self._group.world_size)]
        torch.distributed.all_gather(of_ranks, own, group=self._group.cpu_group)
        total = of_ranks[0]
        for other in of_ranks[1:]:
            total = combine(total, other)
        for event, inputs in zip(events, total, strict=True):
            event.inputs = inputs


def _join(first: Event, second: Event) -> Event:
    """The event of a whole pass from those of its halves."""
    inputs = torch.cat((first.inputs, second.inputs))
    outputs = torch.cat((first.outputs, second.outputs))
    return Event(first.operator, first.path, inputs, outputs, fused=first.fused)


def _digest(values: Any, rows: int) -> torch.Tensor:
    total: torch.Tensor | None = None
    for tensor in _tensors(values):
        if tensor.dim() == 0 or tensor.shape[0] == 0 or tensor.shape[0] % rows:
            continue
        seen = tensor.observed() if isinstance(tensor, LazyTensor) else tensor
        digests = row_digests(seen, rows)
        total = digests if total is None else combine(total, digests)
    return torch.zeros(rows, dtype=torch.int64) if total is None else total.cpu()


def operator_of(path: str, module: torch.nn.Module) -> str | None:
    """Kind of operator that ``module`` is, or None for a module that only holds others."""
    from sglang.srt.layers.linear import LinearBase
    from sglang.srt.layers.logits_processor import LogitsProcessor
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
    from sglang.srt.layers.moe.topk import TopK
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding
    from sglang.srt.layers.vocab_parallel_embedding import VocabParallelEmbedding

    name = path.rpartition(".")[2]
    kinds: tuple[tuple[type, str], ...] = (
        (RadixAttention, ATTENTION),
        (LinearBase, f"linear {name}"),
        (LogitsProcessor, LOGITS),
        (FusedMoE, "experts"),
        (TopK, "expert choice"),
        (RotaryEmbedding, "rotary"),
        (VocabParallelEmbedding, "embedding"),
    )
    for kind, operator in kinds:
        if isinstance(module, kind):
            return operator
    class_name = type(module).__name__
    if "norm" in class_name.lower():
        return f"norm {name}"
    if type(module).__module__.startswith("sglang.srt.layers.activation"):
        return "activation"
    if not any(True for _ in module.children()):
        return class_name
    return None


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    """The tensors among arguments or results, in their order."""
    from sglang.srt.layers.logits_processor import LogitsProcessorOutput

    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, LogitsProcessorOutput):
        yield from _tensors(values.next_token_logits)
    elif isinstance(values, dict):
        for value in values.values():
            yield from _tensors(value)
    elif isinstance(values, tuple | list):
        for value in values:
            yield from _tensors(value)
