"""The canonical sampler: each row's token depends on that row's logits and parameters alone.

Imports no SGLang. Used for candidates (decode) and for canonical rows (prefill and verification) alike:
the same noise is what makes candidates usually match.

Row invariance comes from using nothing whose rounding could depend on the row. Comparisons, maxima,
elementwise arithmetic and integer sums are exact or rounded per element, whatever the layout. Sums of
probabilities are therefore taken over integers, and sums of floats along a fixed folding order.
Transcendental functions are elementwise on a GPU; on a CPU a vector loop may round its tail otherwise
than its body, so there each row is computed in buffers of a fixed shape.

Where this differs from SGLang 0.5.17 (``srt/layers/sampler.py``), on purpose:

- The path is chosen per row, never for the batch, and a row's result is the same on every path.
- Noise is keyed by (seed, position, token id). SGLang keys it by column, and on its top-k/top-p path a
  column is a rank, so that a neighbour's top_p changes the noise of every token.
- Ties go to the lowest token id, in argmax and in the order that top_k and top_p cut.
- Logits are divided by the temperature in fp32, not in the dtype of the logits.
- min_p works together with a seed.

Equal to it: a token survives if its rank is below top_k, *and* the probability before it, over the whole
vocabulary, is at most top_p, *and* its probability is at least min_p times the highest one; temperature
below 1e-6 or top_k 1 means greedy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sglang_ext.llm42.transfer import to_device

DEFAULT_SEED = 42
# SGLang's value for "whole vocabulary" (srt/sampling/sampling_params.py), which requests give as -1.
TOP_K_ALL = 1 << 30
_GREEDY_TEMPERATURE = 1e-6

# SplitMix64 (Steele, Lea, Flood 2014), as signed 64-bit constants.
_GAMMA = 0x9E3779B97F4A7C15 - 2**64
_MIX64_FIRST = 0xBF58476D1CE4E5B9 - 2**64
_MIX64_SECOND = 0x94D049BB133111EB - 2**64
# A 32-bit finaliser of the same form (multiplications and xor-shifts), as signed constants.
_TOKEN_STRIDE = 0x9E3779B9 - 2**32
_MIX32_FIRST = 0x7FEB352D
_MIX32_SECOND = 0x846CA68B - 2**32
# The largest fp32 below 1: keeps log1p(-u) finite for every hash value.
_LARGEST_UNIFORM = 1.0 - 2.0**-24

# Probabilities as integers: weight relative to the row's top token, times 2^40. A vocabulary of up to
# 2^22 tokens stays below 2^63.
_WEIGHT_SCALE = 2.0**40
# On CPU, tokens further than this below the row's maximum (logit over temperature) are sorted only if
# top_k or top_p reach them; tried in this order.
_SORT_DEPTHS = (5.0, 12.0, math.inf)

_LOG2_E = math.log2(math.e)

# CPU blocks. torch splits elementwise loops of more than 32768 elements over threads (log1p: 2048).
# Staying below keeps the bits independent of the thread count, and a step costs microseconds instead of
# a thread wake-up, which on a busy machine takes milliseconds. torch.log and torch.exp are avoided on
# CPU: they go to MKL, which starts threads from 256 elements on.
_BLOCK = 32768
_LOG1P_BLOCK = 2048


@dataclass(frozen=True, slots=True)
class RowParams:
    """One row's sampling parameters, as in a request after defaults; -1 or TOP_K_ALL: no top_k.

    Raises ValueError for values outside the ranges that SGLang accepts.
    """

    temperature: float = 1.0
    top_k: int = TOP_K_ALL
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = DEFAULT_SEED

    def __post_init__(self) -> None:
        if self.top_k == -1:
            object.__setattr__(self, "top_k", TOP_K_ALL)
        if not math.isfinite(self.temperature) or self.temperature < 0:
            raise ValueError(f"temperature must be finite and at least 0, got {self.temperature}")
        if self.top_k < 1:
            raise ValueError(f"top_k must be -1 or at least 1, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be in [0, 1], got {self.min_p}")
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed must fit into 64 bits, got {self.seed}")

    @property
    def greedy(self) -> bool:
        """Whether the row takes the argmax."""
        return self.top_k == 1 or self.temperature < _GREEDY_TEMPERATURE

    @property
    def ordered(self) -> bool:
        """Whether the row needs its tokens in order of probability."""
        return not self.greedy and (self.top_k < TOP_K_ALL or self.top_p < 1)

    @property
    def truncated(self) -> bool:
        """Whether top_k, top_p or min_p may exclude tokens of the row."""
        return self.ordered or (not self.greedy and self.min_p > 0)


# Tensors have no single truth value, so equality of two such objects is identity.
@dataclass(frozen=True, eq=False)
class SamplingRows:
    """Sampling parameters of a batch of rows, on its device, and what the host knows about them.

    temperature, top_p, min_p: float32 [rows]. top_k, seed: int64 [rows]. greedy: bool [rows].
    sampled_rows: int64, the rows that are not greedy. truncated_rows: int64, those of
    ``sampled_rows`` (as indices into it) that top_k, top_p or min_p cut.
    params: the same, on the host.
    any_sampled, any_truncated: whether these are non-empty, known without asking the device.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seed: Tensor
    greedy: Tensor
    sampled_rows: Tensor
    truncated_rows: Tensor
    params: tuple[RowParams, ...]

    @classmethod
    def from_params(
        cls,
        params: Sequence[RowParams],
        device: torch.device | str = "cpu",
        counts: Sequence[int] | None = None,
    ) -> SamplingRows:
        """Build from one entry per row or, with ``counts``, from one per ``counts[i]`` rows in sequence."""
        greedy = [param.greedy for param in params]
        floats = torch.tensor(
            [
                # A greedy row's temperature is never used; 1 keeps a division by it harmless.
                [1.0 if is_greedy else p.temperature for p, is_greedy in zip(params, greedy, strict=True)],
                [param.top_p for param in params],
                [param.min_p for param in params],
            ],
            dtype=torch.float32,
        )
        integers = torch.tensor(
            [
                [param.top_k for param in params],
                [param.seed for param in params],
                greedy,
                [not is_greedy and p.truncated for p, is_greedy in zip(params, greedy, strict=True)],
            ],
            dtype=torch.int64,
        )
        if counts is not None:
            repeats = torch.tensor(counts, dtype=torch.int64)
            floats, integers = floats.repeat_interleave(repeats, 1), integers.repeat_interleave(repeats, 1)
            params = [param for param, count in zip(params, counts, strict=True) for _ in range(count)]
        rows = len(params)
        sampled = (integers[2] == 0).nonzero()[:, 0]
        truncated = integers[3, sampled].nonzero()[:, 0]

        # Few copies: on a GPU each costs more than what it carries.
        temperature, top_p, min_p = to_device(floats, device)
        packed = to_device(torch.cat([integers[:3].reshape(-1), sampled, truncated]), device)
        top_k, seed, is_argmax, sampled_rows, truncated_rows = packed.split(
            [rows, rows, rows, len(sampled), len(truncated)]
        )
        return cls(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            seed=seed,
            greedy=is_argmax.to(torch.bool),
            sampled_rows=sampled_rows,
            truncated_rows=truncated_rows,
            params=tuple(params),
        )

    def __len__(self) -> int:
        return len(self.params)

    @property
    def any_sampled(self) -> bool:
        """Whether any row is not greedy."""
        return len(self.sampled_rows) > 0

    @property
    def any_truncated(self) -> bool:
        """Whether any row has top_k, top_p or min_p."""
        return len(self.truncated_rows) > 0


def derive_seed(seed: int, sample: int) -> int:
    """Seed of sample ``sample`` (0-based) of a request with n > 1.

    Sample 0 uses the request's seed itself; the others get a 63-bit non-negative one.
    Raises ValueError if ``sample`` is negative.
    """
    if sample < 0:
        raise ValueError(f"sample must be at least 0, got {sample}")
    if sample == 0:
        return seed
    mask = 2**64 - 1
    mixed = (seed + sample * _GAMMA) & mask
    mixed = ((mixed ^ (mixed >> 30)) * _MIX64_FIRST) & mask
    mixed = ((mixed ^ (mixed >> 27)) * _MIX64_SECOND) & mask
    return (mixed ^ (mixed >> 31)) >> 1


def sample(logits: Tensor, rows: SamplingRows, positions: Tensor) -> Tensor:
    """Sample one token per row; int64 [rows].

    logits: [rows, vocab], any float dtype; finite or -inf (a row with NaN or without a finite logit
        gives some id inside the vocabulary).
    positions: int64 [rows], absolute position of the token to be sampled. Decode and verification must
        give the same number for the same token.

    Greedy rows: the highest logit, ties to the lowest token id. Others: the highest
    ``logit / temperature + gumbel(seed, position, token id)`` among the tokens that top_k, top_p and
    min_p leave, which samples from their renormalised softmax. No host synchronisation on a GPU.

    Raises ValueError if the shapes do not fit.
    """
    return _sample(logits, rows, positions, None)


def sample_with_margin(logits: Tensor, rows: SamplingRows, positions: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`sample`, and by how much each token won: float32 [rows], in units of the logits.

    The margin is that of the scores that decide, noise included, over the second best token; infinite if
    there is none. A small one predicts divergence between candidate and canonical token: use it to decide
    when to verify, never whether.
    """
    margins = torch.empty(len(rows), dtype=torch.float32, device=logits.device)
    return _sample(logits, rows, positions, margins), margins


def _sample(logits: Tensor, rows: SamplingRows, positions: Tensor, margins: Tensor | None) -> Tensor:
    if logits.dim() != 2 or len(rows) != logits.shape[0] or positions.shape != logits.shape[:1]:
        raise ValueError(
            f"logits {tuple(logits.shape)}, {len(rows)} sampling rows and positions "
            f"{tuple(positions.shape)} do not fit together"
        )
    if logits.device.type == "cpu":
        return _sample_by_row(logits, rows, positions, margins)
    return _sample_batched(logits, rows, positions, margins)


def log_softmax(logits: Tensor) -> Tensor:
    """Row-invariant log-softmax over the last dimension; float32 [rows, vocab].

    torch's own picks the order of its sum by the row's alignment on a GPU.
    """
    if logits.device.type != "cpu":
        return _log_softmax_rows(logits.float())
    result = torch.empty(logits.shape, dtype=torch.float32)
    for row, out in zip(logits, result, strict=True):
        _log_softmax_cpu_row(row, out)
    return result


# Noise


def _row_keys(seed: Tensor, positions: Tensor) -> Tensor:
    """Two 32-bit hash keys per row, int32 [rows, 2], from (seed, position)."""
    mixed = _mix64(_mix64(seed + _GAMMA) + positions.to(torch.int64) * _GAMMA)
    return mixed.contiguous().view(torch.int32).view(-1, 2)


def _mix64(value: Tensor) -> Tensor:
    """SplitMix64's finaliser; int64 multiplication wraps, and masks make the shifts logical."""
    value = (value ^ ((value >> 30) & (2**34 - 1))) * _MIX64_FIRST
    value = (value ^ ((value >> 27) & (2**37 - 1))) * _MIX64_SECOND
    return value ^ ((value >> 31) & (2**33 - 1))


def _hash(token_ids: Tensor, key_low: Tensor, key_high: Tensor) -> Tensor:
    """31-bit hash of (keys, token id), int32; the arguments broadcast.

    The second key enters between the two rounds, so that rows whose first keys are close do not share
    hash values at shifted token ids.
    """
    mixed = token_ids * _TOKEN_STRIDE + key_low
    mixed ^= (mixed >> 16).bitwise_and_(2**16 - 1)
    mixed *= _MIX32_FIRST
    mixed += key_high
    mixed ^= (mixed >> 15).bitwise_and_(2**17 - 1)
    mixed *= _MIX32_SECOND
    mixed ^= (mixed >> 16).bitwise_and_(2**16 - 1)
    return mixed.bitwise_and_(2**31 - 1)


def _gumbel(token_ids: Tensor, key_low: Tensor, key_high: Tensor) -> Tensor:
    """Gumbel noise of (keys, token id), float32, within -2.9..22.2."""
    return _gumbel_of_hash(_hash(token_ids, key_low, key_high))


def _gumbel_of_hash(hashed: Tensor) -> Tensor:
    """-log(-log(1 - u)) for u = (hash + 1/2) / 2^31: small u, which wins, is where fp32 is finest."""
    noise = hashed.to(torch.float32).add_(0.5).mul_(2.0**-31).clamp_(max=_LARGEST_UNIFORM).neg_()
    if noise.device.type != "cpu":
        return noise.log1p_().neg_().log_().neg_()
    for chunk in noise.split(_LOG1P_BLOCK):
        chunk.log1p_()
    return torch.xlogy(-1.0, noise.neg_())


# All rows at once: any device


def _sample_batched(logits: Tensor, rows: SamplingRows, positions: Tensor, margins: Tensor | None) -> Tensor:
    greedy = None
    if len(rows.sampled_rows) < len(rows):
        greedy, lead = _winners(logits, margins is not None)
        if margins is not None:
            margins.copy_(lead)
        if not rows.any_sampled:
            return greedy
    index = rows.sampled_rows
    token_ids = torch.arange(logits.shape[1], dtype=torch.int32, device=logits.device)
    keys = _row_keys(rows.seed[index], positions[index])
    # Adding zero turns -0 into 0, which a radix sort would tell apart.
    scaled = (logits[index].float() / rows.temperature[index, None]).add_(0.0)
    scores = scaled + _gumbel(token_ids, keys[:, :1], keys[:, 1:])
    if rows.any_truncated:
        subset = rows.truncated_rows
        cut = index[subset]
        keep = _keep_mask(scaled[subset], rows.top_k[cut], rows.top_p[cut], rows.min_p[cut])
        scores[subset] = scores[subset].masked_fill(~keep, -math.inf)
    tokens, lead = _winners(scores, margins is not None)
    if margins is not None:
        margins[index] = lead * rows.temperature[index]
    return tokens if greedy is None else greedy.index_copy_(0, index, tokens)


def _winners(values: Tensor, with_lead: bool) -> tuple[Tensor, Tensor]:
    """Argmax of each row, ties to the lowest index, and its lead over the second best if wanted."""
    if values.is_cuda and values.stride(1) == 1:
        from sglang_ext.llm42.top_two import top_two

        return top_two(values)
    return _argmax_lowest(values), _lead(values) if with_lead else values.new_empty(0)


def _lead(values: Tensor) -> Tensor:
    """Highest minus second highest value of each row; infinite where only one is finite."""
    if values.shape[1] < 2:
        return values.new_full((values.shape[0],), math.inf, dtype=torch.float32)
    top = values.topk(2, dim=1).values.float()
    return top[:, 0] - top[:, 1]


def _argmax_lowest(values: Tensor) -> Tensor:
    """Argmax of each row, ties to the lowest index, which torch.argmax does not promise."""
    columns = values.shape[1]
    ids = torch.arange(columns, dtype=torch.int32, device=values.device)
    best = values.amax(dim=1, keepdim=True)
    lowest = torch.where(values == best, ids, columns).amin(dim=1)
    # NaN equals nothing; the id must stay inside the embedding table all the same.
    return lowest.clamp_(max=columns - 1).to(torch.int64)


def _keep_mask(scaled: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Which tokens survive, bool [rows, vocab]; everything true for a row without truncation."""
    ordered, order = scaled.sort(dim=1, descending=True, stable=True)
    weights = _exp_(ordered - ordered[:, :1])
    mass = _integer_mass(weights)
    cumulated = mass.cumsum(dim=1)
    limit = _mass_limit(cumulated[:, -1], top_p)
    rank = torch.arange(scaled.shape[1], device=scaled.device)
    keep = (rank < top_k[:, None]) & (cumulated - mass <= limit[:, None]) & (weights >= min_p[:, None])
    return torch.empty_like(keep).scatter_(1, order, keep)


def _integer_mass(weights: Tensor) -> Tensor:
    """Weights in [0, 1] as int64. Integer sums are exact, so the order of a parallel scan, which on a
    GPU follows the number of rows, cannot change what top_p keeps."""
    return (weights * _WEIGHT_SCALE).to(torch.int64)


def _mass_limit(total: Tensor, top_p: Tensor) -> Tensor:
    """The integer mass that may stand before a kept token; at top_p 1 all of it, without rounding."""
    limit = (total.to(torch.float64) * top_p.to(torch.float64)).floor_().to(torch.int64)
    return torch.where(top_p >= 1, total, limit)


def _log_softmax_rows(logits: Tensor) -> Tensor:
    shifted = logits - logits.amax(dim=-1, keepdim=True)
    return shifted - _fold_sum(_exp_(shifted.clone())).log()


def _exp_(values: Tensor) -> Tensor:
    """exp in place, for values up to 0; relative error below 1e-5 wherever the result matters."""
    return values.mul_(_LOG2_E).exp2_()


def _fold_sum(values: Tensor) -> Tensor:
    """Sum over the last dimension, kept as size 1, by adding halves in place: an order of additions
    that depends on the length alone. Overwrites ``values``."""
    count = values.shape[-1]
    while count > 1:
        half = (count + 1) // 2
        values[..., : count - half] += values[..., half:count]
        count = half
    return values[..., :1]


# One row after the other: CPU


def _sample_by_row(logits: Tensor, rows: SamplingRows, positions: Tensor, margins: Tensor | None) -> Tensor:
    tokens = torch.empty(len(rows), dtype=torch.int64)
    vocab = logits.shape[1]
    id_blocks = [
        torch.arange(start, min(start + _BLOCK, vocab), dtype=torch.int32)
        for start in range(0, vocab, _BLOCK)
    ]
    keys = _row_keys(rows.seed, positions)
    scaled = torch.empty(vocab, dtype=torch.float32)
    scores = torch.empty_like(scaled)
    for row, params in enumerate(rows.params):
        if params.greedy:
            tokens[row] = _argmax_row(logits[row])
            if margins is not None:
                margins[row] = _lead(logits[row : row + 1])[0]
            continue
        _scale_row(logits[row], rows.temperature[row], scaled)
        _score_row(scaled, id_blocks, keys[row], scores)
        if not params.truncated:
            tokens[row] = _argmax_row(scores)
            deciding = scores
        else:
            kept = _kept_ids(scaled, params, rows.top_p[row], rows.min_p[row])
            tokens[row] = _argmax_among(scores, kept)
            deciding = scores.index_select(0, kept)
        if margins is not None:
            margins[row] = _lead(deciding[None])[0] * params.temperature
    return tokens


def _scale_row(logits: Tensor, temperature: Tensor, scaled: Tensor) -> None:
    for source, block in zip(logits.split(_BLOCK), scaled.split(_BLOCK), strict=True):
        block.copy_(source).div_(temperature)


def _score_row(scaled: Tensor, id_blocks: list[Tensor], keys: Tensor, scores: Tensor) -> None:
    blocks = zip(scaled.split(_BLOCK), id_blocks, scores.split(_BLOCK), strict=True)
    for block, ids, out in blocks:
        torch.add(block, _gumbel(ids, keys[0], keys[1]), out=out)


def _argmax_row(values: Tensor) -> int:
    """``_argmax_lowest`` of one row: only the first block that holds the maximum is searched."""
    blocks = values.split(_BLOCK)
    maxima = [block.amax().item() for block in blocks]
    best = max(maxima)
    number = maxima.index(best)
    return number * _BLOCK + int(_argmax_lowest(blocks[number].view(1, -1)))


def _argmax_among(scores: Tensor, kept: Tensor) -> int:
    if len(kept) == 0:
        return 0  # only a row with NaN or without a finite logit keeps nothing
    values = scores.index_select(0, kept)
    return int(kept[values == values.amax()].amin())


def _kept_ids(scaled: Tensor, params: RowParams, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Ids of the tokens that survive, in no promised order: ``_keep_mask`` of one row.

    Sorts only the tokens near the maximum when these decide: they are the first of the full order, and
    what lies behind them is cut if their last one is.
    """
    blocks = scaled.split(_BLOCK)
    top = torch.stack([block.amax() for block in blocks]).amax()
    weights = torch.empty_like(scaled)
    for block, out in zip(blocks, weights.split(_BLOCK), strict=True):
        torch.sub(block, top, out=out)
        _exp_(out)
    if not params.ordered:
        return _ids_at_least(weights, min_p)
    total = torch.stack([_integer_mass(block).sum() for block in weights.split(_BLOCK)]).sum()
    limit = _mass_limit(total, top_p)

    for depth in _SORT_DEPTHS:
        ids = _ids_at_least(scaled, top - depth)
        ids = ids.index_select(0, scaled.index_select(0, ids).sort(descending=True, stable=True).indices)
        kept_weights = weights.index_select(0, ids)
        mass = _integer_mass(kept_weights)
        keep = (torch.arange(len(ids)) < params.top_k) & (mass.cumsum(0) - mass <= limit)
        if len(ids) == len(scaled) or (len(ids) > 0 and not keep[-1]):
            break
    return ids[keep & (kept_weights >= min_p)]


def _ids_at_least(values: Tensor, bound: Tensor) -> Tensor:
    """Ascending indices of the values of one row that reach ``bound``."""
    found = [
        (block >= bound).nonzero().view(-1).add_(number * _BLOCK)
        for number, block in enumerate(values.split(_BLOCK))
    ]
    return torch.cat(found)


def _log_softmax_cpu_row(logits: Tensor, out: Tensor) -> None:
    top = torch.stack([block.amax() for block in logits.split(_BLOCK)]).amax().float()
    sums = []
    for source, block in zip(logits.split(_BLOCK), out.split(_BLOCK), strict=True):
        block.copy_(source).sub_(top)
        # A buffer of its own: a row of the result may start at any address.
        sums.append(_fold_sum(_exp_(block.clone())))
    log_total = _fold_sum(torch.cat(sums)).log()
    for block in out.split(_BLOCK):
        block.sub_(log_total)
