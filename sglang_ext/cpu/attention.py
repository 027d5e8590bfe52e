"""Row-invariant causal attention over a slot-addressed KV cache, in PyTorch, for canonical passes on a CPU.

``torch.nn.functional.scaled_dot_product_attention`` cuts keys and queries into blocks by the lengths of the
call, so that a row's bits change with the segment around it. Here keys are cut into tiles at absolute
positions (0, tile, 2*tile, ...), every product of a call has one shape, and a tile that lies beyond a row
adds exact zeros to it. What remains of a row's arithmetic is a function of the row alone, provided that the
platform's products and elementwise functions treat all rows of a call alike: the tests and the server's
certification look at that row by row. Online softmax over tiles as in FlashAttention (Dao et al., 2022,
algorithm 1), all in fp32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

#: Positions per tile. Larger tiles are a little faster at long contexts and waste more at short ones.
DEFAULT_TILE = 64


class _Shape(NamedTuple):
    """Sizes of a call: one product per segment and key head, each of ``product_rows`` queries."""

    segments: int
    rows: int
    kv_heads: int
    heads_per_kv_head: int
    key_size: int
    value_size: int
    tile: int

    @property
    def products(self) -> int:
        return self.segments * self.kv_heads

    @property
    def product_rows(self) -> int:
        return self.heads_per_kv_head * self.rows


@torch.no_grad()
def canonical_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    start: torch.Tensor,
    scaling: float,
    logit_cap: float = 0.0,
    tile: int = DEFAULT_TILE,
) -> torch.Tensor:
    """Attention of segment g's row i to the absolute positions ``0 .. start[g] + i`` of its own sequence.

    The bits of a row depend on its query, its position and the keys and values of its own prefix: not on g,
    i, where its segment starts, other rows, other segments' lengths, or anything stored beyond its position
    (NaN and infinities included). A non-finite number inside its own prefix makes the row non-finite.

    Args:
        q: ``[segments, rows, heads, key_size]`` queries, any floating type.
        k_cache: ``[slots, kv_heads, key_size]`` keys; ``heads`` is a multiple of ``kv_heads``.
        v_cache: ``[slots, kv_heads, value_size]`` values.
        slots: ``[segments, positions]`` int64, slot of every absolute position of the segment's sequence, 0
            where there is none; at least ``start + rows`` positions.
        start: ``[segments]`` int64, absolute position of each segment's first row.
        scaling: factor on the logits.
        logit_cap: if positive, logits x become ``logit_cap * tanh(x / logit_cap)``.
        tile: positions per tile; part of what the bits depend on.

    Returns:
        ``[segments, rows, heads, value_size]`` in the type of ``q``, contiguous.

    Raises:
        ValueError: shapes that do not fit together.
    """
    shape = _shape_of(q, k_cache, v_cache, slots, start, tile)
    tiles = (int(start.max()) + shape.rows + tile - 1) // tile
    if tiles * tile > slots.shape[1]:
        slots = torch.nn.functional.pad(slots, (0, tiles * tile - slots.shape[1]))
    caches = (k_cache, v_cache, slots[:, : tiles * tile])
    output = _attend(shape, q, *caches, start, scaling, logit_cap, guard=False)
    if not bool(torch.isfinite(output).all()):
        # A zero weight does not cancel a NaN or infinite value (0 * NaN is NaN), so such values may have
        # leaked from beyond a row. Rows without any come out with the same bits either way.
        output = _attend(shape, q, *caches, start, scaling, logit_cap, guard=True)
    heads_first = (shape.segments, shape.kv_heads, shape.heads_per_kv_head, shape.rows, shape.value_size)
    output = output.view(heads_first).permute(0, 3, 1, 2, 4).to(q.dtype).contiguous()
    return output.view(*q.shape[:3], shape.value_size)


def _shape_of(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    start: torch.Tensor,
    tile: int,
) -> _Shape:
    segments, rows, heads, key_size = q.shape
    kv_heads, value_size = v_cache.shape[1:]
    if k_cache.shape[1:] != (kv_heads, key_size) or heads % kv_heads:
        raise ValueError(
            f"queries {tuple(q.shape)}, keys {tuple(k_cache.shape)}, values {tuple(v_cache.shape)} do not fit"
        )
    if slots.shape[0] != segments or start.shape != (segments,):
        raise ValueError(
            f"{segments} segments, but slots {tuple(slots.shape)} and start {tuple(start.shape)}"
        )
    if int(start.max()) + rows > slots.shape[1]:
        raise ValueError(f"row at position {int(start.max()) + rows - 1}, but slots end at {slots.shape[1]}")
    return _Shape(segments, rows, kv_heads, heads // kv_heads, key_size, value_size, tile)


def _attend(
    shape: _Shape,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    start: torch.Tensor,
    scaling: float,
    logit_cap: float,
    guard: bool,
) -> torch.Tensor:
    """fp32 output ``[products, product_rows, value_size]``.

    ``guard`` keeps non-finite values beyond a row out of it, at the price of two more products per tile.
    """
    batch, rows, tile = shape.products, shape.product_rows, shape.tile
    query = _queries(shape, q, scaling)
    position = _positions(shape, start)
    in_every_prefix = int(start.min())
    highest = torch.full((batch, rows, 1), float("-inf"))
    weight_sum = torch.zeros(batch, rows, 1)
    output = torch.zeros(batch, rows, shape.value_size)
    poisoned = torch.zeros(batch, rows, shape.value_size, dtype=torch.bool) if guard else None
    keys = torch.empty(batch, tile, shape.key_size)
    values = torch.empty(batch, tile, shape.value_size)
    logits = torch.empty(batch, rows, tile)
    for first in range(0, slots.shape[1], tile):
        here = slots[:, first : first + tile].reshape(-1)
        _gather(shape, k_cache, here, keys)
        _gather(shape, v_cache, here, values)
        torch.bmm(query, keys.transpose(1, 2), out=logits)
        if logit_cap > 0:
            logits.div_(logit_cap).tanh_().mul_(logit_cap)
        beyond = None
        if guard or first + tile - 1 > in_every_prefix:
            beyond = torch.arange(first, first + tile) > position
            logits.masked_fill_(beyond, float("-inf"))
        if poisoned is not None and beyond is not None:
            poisoned |= _clean(values, beyond)
        new_highest = torch.maximum(highest, logits.amax(-1, keepdim=True))
        weights = logits.sub_(new_highest).exp_()
        # exactly 1 for a row that this tile lies beyond, so that the tile leaves the row as it is
        shrink = highest.sub_(new_highest).exp_()
        weight_sum.mul_(shrink).add_(weights.sum(-1, keepdim=True))
        output.mul_(shrink).baddbmm_(weights, values)
        highest = new_highest
    output /= weight_sum
    return output if poisoned is None else output.masked_fill_(poisoned, float("nan"))


def _queries(shape: _Shape, q: torch.Tensor, scaling: float) -> torch.Tensor:
    """Scaled fp32 queries ``[products, product_rows, key_size]``."""
    split = (q.float() * scaling).view(
        shape.segments, shape.rows, shape.kv_heads, shape.heads_per_kv_head, shape.key_size
    )
    return split.permute(0, 2, 3, 1, 4).reshape(shape.products, shape.product_rows, shape.key_size)


def _positions(shape: _Shape, start: torch.Tensor) -> torch.Tensor:
    """Absolute position of every product row, ``[products, product_rows, 1]``."""
    position = start[:, None] + torch.arange(shape.rows)
    position = position[:, None, None, :].expand(-1, shape.kv_heads, shape.heads_per_kv_head, -1)
    return position.reshape(shape.products, shape.product_rows, 1)


def _gather(shape: _Shape, cache: torch.Tensor, slots: torch.Tensor, tile: torch.Tensor) -> None:
    """Copy the cache rows of one tile of all segments to ``tile`` ``[products, tile, size]``, as fp32."""
    gathered = cache.index_select(0, slots).view(shape.segments, shape.tile, shape.kv_heads, -1)
    tile.view(shape.segments, shape.kv_heads, shape.tile, -1).copy_(gathered.transpose(1, 2))


def _clean(values: torch.Tensor, beyond: torch.Tensor) -> torch.Tensor:
    """Zero non-finite ``values`` in place; true where an output ``[.., rows, size]`` attends to one."""
    finite = values.isfinite()
    attended = torch.bmm((~beyond).float(), (~finite).float()) > 0
    values.masked_fill_(~finite, 0.0)
    return attended
