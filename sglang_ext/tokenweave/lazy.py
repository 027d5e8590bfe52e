"""Tensors that stand for work not done yet, so that model code needs no change.

:class:`PendingAllReduce` is the output of an all-reduce that has not been performed: a norm with a residual
takes its partial sums and does the fused step instead; anything else that touches the values first performs
the plain all-reduce. :class:`ShardedResidual` is a residual of which this rank holds only its own rows:
anything that touches its values first gathers the others'. Both are therefore safe with any model; a model
whose norms do not follow its all-reduces merely gains nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_PROPERTIES = (
    "shape",
    "dtype",
    "device",
    "layout",
    "ndim",
    "is_cuda",
    "is_cpu",
    "is_meta",
    "is_quantized",
    "is_sparse",
    "requires_grad",
)
#: What may be asked of a lazy tensor without its values.
_METADATA = frozenset(
    {
        *(getattr(torch.Tensor, name).__get__ for name in _PROPERTIES),
        torch.Tensor.dim,
        torch.Tensor.ndimension,
        torch.Tensor.size,
        torch.Tensor.numel,
        torch.Tensor.nelement,
        torch.Tensor.element_size,
        torch.Tensor.stride,
        torch.Tensor.is_contiguous,
        torch.Tensor.is_floating_point,
        torch.Tensor.get_device,
        torch.Tensor.__len__,
    }
)
_VIEWS = frozenset({torch.Tensor.view, torch.Tensor.reshape, torch.reshape})


class LazyTensor(torch.Tensor):
    """A tensor whose values must be made before they are read; see the module's subclasses."""

    def materialize(self) -> torch.Tensor:
        """The plain tensor with its values."""
        raise NotImplementedError

    def observed(self) -> torch.Tensor:
        """Values for an observer, who must not bring about what the tensor stands for."""
        return self.materialize()

    def lazy_view(self, view: torch.Tensor) -> torch.Tensor | None:
        """``view`` (plain, same storage, same row length) as a lazy tensor; None to materialize instead."""
        return None

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func in _VIEWS and isinstance(args[0], LazyTensor):
            source = args[0]
            with torch._C.DisableTorchFunctionSubclass():
                view = func(plain(source), *args[1:], **kwargs)
                same_rows = view.dim() > 0 and view.shape[-1] == source.shape[-1]
            if same_rows and (lazy := source.lazy_view(view)) is not None:
                return lazy
        return func(*_materialized(args), **_materialized(kwargs))


class PendingAllReduce(LazyTensor):
    """Partial sums of this rank [tokens, hidden], whose all-reduce has not been performed."""

    reduction: _Reduction

    def materialize(self) -> torch.Tensor:
        """The sum over ranks, by the plain all-reduce (once, however many views there are)."""
        with torch._C.DisableTorchFunctionSubclass():
            return self.reduction.result().view(self.shape)

    def lazy_view(self, view: torch.Tensor) -> torch.Tensor | None:
        """The same reduction seen in another shape."""
        lazy = view.as_subclass(PendingAllReduce)
        lazy.reduction = self.reduction
        return lazy

    def observed(self) -> torch.Tensor:
        """The sum if it was made, else this rank's partial sums."""
        return self.materialize() if self.reduction.done else plain(self)

    def take_partial(self) -> torch.Tensor | None:
        """The partial sums for a fused step, in the shape of this view; None if already reduced."""
        if not self.reduction.take():
            return None
        return plain(self)


class _Reduction:
    """One all-reduce: pending, done plainly, or taken over by a fused step.

    Attributes:
        taken: whether a fused step has taken the partial sums.
    """

    def __init__(self, partial: torch.Tensor, all_reduce: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._partial = partial
        self._all_reduce = all_reduce
        self._result: torch.Tensor | None = None
        self.taken = False

    @property
    def done(self) -> bool:
        """Whether the sum was made by the plain all-reduce."""
        return self._result is not None

    def watch(
        self, around: Callable[[Callable[[torch.Tensor], torch.Tensor], torch.Tensor], torch.Tensor]
    ) -> None:
        """Have the plain all-reduce, if it comes to that, run as ``around(all_reduce, partial)``."""
        all_reduce = self._all_reduce
        self._all_reduce = lambda partial: around(all_reduce, partial)

    def result(self) -> torch.Tensor:
        if self.taken:
            raise RuntimeError(
                "a model reads the output of an all-reduce again after the norm that consumed it; "
                "TokenWeave cannot serve this model, start without --enable-tokenweave"
            )
        if self._result is None:
            self._result = self._all_reduce(self._partial)
        return self._result

    def take(self) -> bool:
        if self._result is not None or self.taken:
            return False
        self.taken = True
        return True


class ShardedResidual(LazyTensor):
    """Residual [tokens, hidden] of which only the rows ``own_rows`` are right on this rank."""

    own_rows: slice
    gather_all: Callable[[torch.Tensor, int], torch.Tensor]

    def materialize(self) -> torch.Tensor:
        """The whole residual, gathered from all ranks (a collective: every rank does the same)."""
        whole = plain(self)
        return self.gather_all(whole[self.own_rows], whole.shape[0])

    @property
    def shard(self) -> torch.Tensor:
        """This rank's rows, as a view."""
        return plain(self)[self.own_rows]


def pending_all_reduce(
    partial: torch.Tensor, all_reduce: Callable[[torch.Tensor], torch.Tensor]
) -> PendingAllReduce:
    """``partial`` with its all-reduce put off."""
    lazy = partial.as_subclass(PendingAllReduce)
    lazy.reduction = _Reduction(partial, all_reduce)
    return lazy


def sharded_residual(
    whole: torch.Tensor, rows: slice, gather: Callable[[torch.Tensor, int], torch.Tensor]
) -> ShardedResidual:
    """``whole`` with only ``rows`` valid; ``gather(own rows, tokens)`` brings the others."""
    lazy = whole.as_subclass(ShardedResidual)
    lazy.own_rows, lazy.gather_all = rows, gather
    return lazy


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """The ordinary tensor on the same storage, values as they are."""
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.as_subclass(torch.Tensor)


def materialized(value: Any) -> Any:
    """``value`` with every lazy tensor in it (also in lists, tuples and dicts) made plain."""
    return _materialized(value)


def _materialized(value: Any) -> Any:
    if isinstance(value, LazyTensor):
        return value.materialize()
    if type(value) in (list, tuple):
        return type(value)(_materialized(item) for item in value)
    if type(value) is dict:
        return {key: _materialized(item) for key, item in value.items()}
    return value
