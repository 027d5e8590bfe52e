"""The canonical sampler: row invariance, semantics of the cuts, and the distribution of its noise."""

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sglang_ext.llm42 import sampling
from sglang_ext.llm42.sampling import (
    DEFAULT_SEED,
    TOP_K_ALL,
    RowParams,
    SamplingRows,
    derive_seed,
    log_softmax,
    sample,
    sample_with_margin,
)

Sampler = Callable[[Tensor, SamplingRows, Tensor], Tensor]

VOCABS = [49152, 32000, 1000, 17]
CROWD = [
    RowParams(temperature=0.0),
    RowParams(temperature=0.7, top_p=0.8, seed=1),
    RowParams(temperature=1.3, top_k=5, seed=2),
    RowParams(temperature=1.0, min_p=0.1, seed=3),
    RowParams(temperature=0.9, seed=4),
    RowParams(temperature=2.5, top_k=40, top_p=0.9, min_p=0.02, seed=5),
    RowParams(top_k=1),
]
TARGETS = [
    RowParams(temperature=0.0),
    RowParams(temperature=0.8, seed=11),
    RowParams(temperature=0.8, top_p=0.9, seed=11),
    RowParams(temperature=0.8, top_k=20, seed=11),
    RowParams(temperature=0.8, min_p=0.05, seed=11),
]

devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


@pytest.fixture(autouse=True)
def need_the_device(request: pytest.FixtureRequest) -> None:
    callspec = getattr(request.node, "callspec", None)
    if callspec and callspec.params.get("device") == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Thread wake-ups would dominate these small tests wherever something else uses the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=[1, 2], ids=["one_thread", "two_threads"])
def threads(request: pytest.FixtureRequest, one_thread: None) -> int:
    torch.set_num_threads(request.param)
    return int(request.param)


def random_logits(rows: int, vocab: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, vocab, generator=generator) * 3


def knife_edge_logits(vocab: int, params: RowParams, position: int) -> Tensor:
    """Logits that cancel the row's noise, so that rounding alone decides which score is highest: a
    change in the last bit of any noise value or scaled logit is likely to change the token."""
    keys = sampling._row_keys(torch.tensor([params.seed]), torch.tensor([position]))[0]
    noise = sampling._gumbel(torch.arange(vocab, dtype=torch.int32), keys[0], keys[1])
    return -noise * (params.temperature or 1.0)


def token_alone(sampler: Sampler, logits: Tensor, params: RowParams, position: int) -> int:
    rows = SamplingRows.from_params([params], logits.device)
    return int(sampler(logits.view(1, -1), rows, torch.tensor([position], device=logits.device)))


def check_row_invariance(
    sampler: Sampler, vocab: int, counts: list[int], device: str = "cpu", dtype: torch.dtype = torch.float32
) -> None:
    """Each target row gives the same token alone and at every index of crowds of several sizes."""
    position = 1000
    for number, target in enumerate(TARGETS):
        for logits in (
            random_logits(1, vocab, number)[0].to(device, dtype),
            knife_edge_logits(vocab, target, position).to(device, dtype),
        ):
            expected = token_alone(sampler, logits, target, position)
            for count in counts:
                crowd = [CROWD[(index + count) % len(CROWD)] for index in range(count)]
                noise = random_logits(count, vocab, count).to(device, dtype)
                for index in range(count):
                    params = [*crowd[:index], target, *crowd[index + 1 :]]
                    batch = noise.clone()
                    batch[index] = logits
                    positions = torch.arange(count, device=device) * 7
                    positions[index] = position
                    tokens = sampler(batch, SamplingRows.from_params(params, device), positions)
                    assert int(tokens[index]) == expected, (target, count, index)


@pytest.mark.parametrize("vocab", VOCABS)
def test_rows_are_invariant(vocab: int, threads: int) -> None:
    counts = [2, 5] if vocab > 10_000 else [2, 3, 8, 17]
    check_row_invariance(sample, vocab, counts)


@pytest.mark.parametrize("vocab", [1000, 17])
def test_rows_are_invariant_in_bfloat16(vocab: int) -> None:
    check_row_invariance(sample, vocab, [2, 9], dtype=torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [*VOCABS, 50257])
def test_rows_are_invariant_on_gpu(vocab: int) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    check_row_invariance(sample, vocab, [2, 7, 64], "cuda")


def test_last_row_of_64(threads: int) -> None:
    logits = random_logits(64, 49152)
    params = [CROWD[row % len(CROWD)] for row in range(64)]
    tokens = sample(logits, SamplingRows.from_params(params), torch.arange(64))
    for row in range(64):
        assert int(tokens[row]) == token_alone(sample, logits[row], params[row], row)


def batch_wide_sampler(logits: Tensor, rows: SamplingRows, positions: Tensor) -> Tensor:
    """The fault to be caught, as in stock SGLang: one neighbour with top_p, top_k or min_p moves every
    row onto a sorted path, where the noise belongs to ranks."""
    scaled = logits.float() / rows.temperature[:, None]
    scaled[rows.greedy] *= 1e6
    columns = torch.arange(logits.shape[1], dtype=torch.int32)
    keys = sampling._row_keys(rows.seed, positions)
    noise = sampling._gumbel(columns, keys[:, :1], keys[:, 1:])
    if not rows.any_truncated:
        return (scaled + noise).argmax(dim=1)
    keep = sampling._keep_mask(scaled, rows.top_k, rows.top_p, rows.min_p)
    ordered, order = scaled.masked_fill(~keep, -math.inf).sort(dim=1, descending=True, stable=True)
    return order.gather(1, (ordered + noise).argmax(dim=1, keepdim=True)).view(-1)


def test_the_invariance_check_catches_a_batch_wide_path() -> None:
    with pytest.raises(AssertionError):
        check_row_invariance(batch_wide_sampler, 1000, [2, 3, 5])


def noise_with_a_row_dependent_tail(logits: Tensor, rows: SamplingRows, positions: Tensor) -> Tensor:
    """The fault to be caught: the last bit of one element in a vector tail depends on the row's index."""
    columns = torch.arange(logits.shape[1], dtype=torch.int32)
    keys = sampling._row_keys(rows.seed, positions)
    noise = sampling._gumbel(columns, keys[:, :1], keys[:, 1:])
    scores = logits.float() / rows.temperature[:, None] + noise
    odd = torch.arange(len(rows)) % 2 == 1
    tail = scores[odd, -8:]
    scores[odd, -8:] = torch.nextafter(tail, torch.full_like(tail, math.inf))
    return scores.argmax(dim=1)


def test_the_invariance_check_catches_one_bit_in_a_tail() -> None:
    with pytest.raises(AssertionError):
        check_row_invariance(noise_with_a_row_dependent_tail, 17, [2, 3])


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_softmax_is_row_invariant_and_right(vocab: int, dtype: torch.dtype, threads: int) -> None:
    for count in (1, 2, 3, 8, 17):
        logits = random_logits(count, vocab, count).to(dtype)
        result = log_softmax(logits)
        assert result.dtype == torch.float32
        for index in range(count):
            assert torch.equal(result[index], log_softmax(logits[index : index + 1])[0])
        expected = logits.double().log_softmax(dim=-1)
        torch.testing.assert_close(result.double(), expected, rtol=1e-6, atol=5e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [49152, 50257, 17])
def test_log_softmax_is_row_invariant_on_gpu(vocab: int) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    logits = random_logits(64, vocab).cuda()
    result = log_softmax(logits)
    for index in range(64):
        assert torch.equal(result[index], log_softmax(logits[index : index + 1])[0])
        for count in (3, 17):
            crowd = logits[torch.arange(index, index + count) % 64]
            assert torch.equal(result[index], log_softmax(crowd)[0])
    torch.testing.assert_close(result.double(), logits.double().log_softmax(-1), rtol=1e-6, atol=5e-6)


def test_bits_do_not_depend_on_the_thread_count() -> None:
    logits = random_logits(5, 49152)
    rows = SamplingRows.from_params(TARGETS)
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        edges = [knife_edge_logits(49152, params, 3) for params in TARGETS]
        tokens = sample(torch.stack(edges), rows, torch.full((5,), 3))
        results.append(torch.cat([*edges, log_softmax(logits).view(-1), tokens.float()]))
    assert torch.equal(results[0], results[1])


# The batched path (GPU) and the row path (CPU) are two ways to the same token.


@pytest.mark.parametrize("vocab", VOCABS)
def test_batched_and_row_path_agree(vocab: int) -> None:
    logits = random_logits(28, vocab, 5)
    logits[:, ::3] = logits[:, ::3].round()  # ties
    rows = SamplingRows.from_params((CROWD * 4)[:28])
    for position in (0, 5, 4000):
        positions = torch.full((28,), position)
        assert torch.equal(
            sampling._sample_batched(logits, rows, positions, None),
            sampling._sample_by_row(logits, rows, positions, None),
        )


row_params = st.builds(
    RowParams,
    temperature=st.floats(0.1, 3),
    top_k=st.sampled_from([-1, 1, 2, 3, 7, 100]),
    top_p=st.sampled_from([1.0, 0.999, 0.9, 0.5, 0.1, 1e-6]),
    min_p=st.sampled_from([0.0, 0.01, 0.3, 1.0]),
    seed=st.integers(-(2**63), 2**63 - 1),
)
# Few distinct values, so that ties stand at every cut; wide enough for each sort depth.
tied_logits = st.lists(st.integers(-40, 2).map(lambda value: value / 2), min_size=1, max_size=60)


@settings(deadline=None, max_examples=300)
@given(tied_logits, row_params)
def test_kept_tokens_of_both_paths(values: list[float], params: RowParams) -> None:
    scaled = torch.tensor(values)
    rows = SamplingRows.from_params([params])
    keep = sampling._keep_mask(scaled.view(1, -1), rows.top_k, rows.top_p, rows.min_p)[0]
    if not params.truncated:
        if not params.greedy:
            assert keep.all()
        return
    kept = sampling._kept_ids(scaled, params, rows.top_p[0], rows.min_p[0])
    assert sorted(kept.tolist()) == keep.nonzero().view(-1).tolist()


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 80), row_params, st.integers(0, 2**31))
def test_kept_tokens_follow_sglang(vocab: int, params: RowParams, seed: int) -> None:
    """Against top_k_top_p_min_p_sampling_from_probs_torch's rules, in float64, one token at a time."""
    scaled = random_logits(1, vocab, seed)
    probabilities = scaled[0].double().softmax(0).tolist()
    order = sorted(range(vocab), key=lambda token: (-probabilities[token], token))
    expected, before = set(), 0.0
    for rank, token in enumerate(order):
        clear = abs(before - params.top_p) > 1e-6
        floor = params.min_p * probabilities[order[0]]
        if not clear or (rank > 0 and abs(probabilities[token] - floor) < 1e-5 * floor):
            return  # float32 may decide a tie with the threshold either way
        if rank < params.top_k and before <= params.top_p and (rank == 0 or probabilities[token] >= floor):
            expected.add(token)
        before += probabilities[token]
    rows = SamplingRows.from_params([params])
    keep = sampling._keep_mask(scaled, rows.top_k, rows.top_p, rows.min_p)[0]
    assert set(keep.nonzero().view(-1).tolist()) == expected


def test_top_k_keeps_the_lowest_ids_of_a_tie() -> None:
    logits = torch.zeros(1, 1000)
    logits[0, 500] = 1.0
    params = [RowParams(top_k=4, seed=seed) for seed in range(400)]
    tokens = sample(
        logits.expand(400, -1), SamplingRows.from_params(params), torch.zeros(400, dtype=torch.long)
    )
    assert set(tokens.tolist()) == {500, 0, 1, 2}


@pytest.mark.parametrize("depth", [4.0, 11.0, 30.0])
def test_top_p_reaches_every_sort_depth(depth: float) -> None:
    """A head of one token and a flat tail that holds half of the mass, however deep it lies."""
    tail = 20_000 if depth < 12 else 40_000
    logits = torch.full((tail + 1,), -depth)
    logits[7] = math.log(tail) - depth  # mass 1/2
    params = RowParams(top_p=0.75)
    rows = SamplingRows.from_params([params])
    kept = sampling._kept_ids(logits, params, rows.top_p[0], rows.min_p[0])
    assert len(kept) == pytest.approx(tail / 2, abs=3)
    assert 7 in kept.tolist()


@devices
def test_top_p_one_keeps_tokens_without_mass(device: str) -> None:
    """So that a row is the same whether or not it takes the sorted path. The sum of these weights, 20,000
    times 2^40 and a little, is no float64: rounded down, it would cut the token that comes last."""
    logits = torch.zeros(1, 20_002, device=device)
    logits[0, 77] = -27.5
    logits[0, 78] = -60.0
    rows = SamplingRows.from_params([RowParams(top_k=50_000)], device)
    assert sampling._keep_mask(logits, rows.top_k, rows.top_p, rows.min_p).all()
    if device == "cpu":
        assert len(sampling._kept_ids(logits[0], rows.params[0], rows.top_p[0], rows.min_p[0])) == 20_002


def test_tied_scores_go_to_the_lowest_kept_id() -> None:
    scores = torch.tensor([5.0, 1.0, 5.0, 5.0, 5.0])
    assert sampling._argmax_among(scores, torch.tensor([4, 1, 3, 2])) == 2


# Greedy


@devices
@pytest.mark.parametrize("vocab", [49152, 40001, 17])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_greedy_takes_the_lowest_of_tied_ids(device: str, vocab: int, dtype: torch.dtype) -> None:
    for tied in ([vocab - 1], [vocab - 2, vocab - 1], [0, vocab - 1], [vocab // 2, vocab - 1]):
        logits = random_logits(3, vocab).clamp_(max=5).to(dtype)
        logits[:, tied] = 6.0
        rows = SamplingRows.from_params([RowParams(temperature=0.0)] * 3, device)
        tokens = sample(logits.to(device), rows, torch.arange(3, device=device))
        assert tokens.tolist() == [tied[0]] * 3
        assert tokens.dtype == torch.int64


@devices
def test_masked_and_broken_rows_stay_inside_the_vocabulary(device: str) -> None:
    logits = torch.full((3, 50), -math.inf)
    logits[0, 31] = -7.0
    logits[1] = math.nan
    for params in TARGETS:
        rows = SamplingRows.from_params([params] * 3, device)
        tokens = sample(logits.to(device), rows, torch.arange(3, device=device)).tolist()
        assert tokens[0] == 31
        assert all(0 <= token < 50 for token in tokens)


# Noise


def python_hash(seed: int, position: int, token: int) -> int:
    """The hash, in Python's unbounded integers."""
    mask64, mask32 = 2**64 - 1, 2**32 - 1

    def mix64(value: int) -> int:
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask64
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask64
        return value ^ (value >> 31)

    gamma = 0x9E3779B97F4A7C15
    key = mix64((mix64((seed + gamma) & mask64) + position * gamma) & mask64)
    mixed = (token * 0x9E3779B9 + (key & mask32)) & mask32
    mixed = ((mixed ^ (mixed >> 16)) * 0x7FEB352D) & mask32
    mixed = (mixed + (key >> 32)) & mask32
    mixed = ((mixed ^ (mixed >> 15)) * 0x846CA68B) & mask32
    return (mixed ^ (mixed >> 16)) & (2**31 - 1)


@devices
def test_hash_equals_integer_arithmetic(device: str) -> None:
    """Wrap-around and logical shifts, vector body and tail."""
    seeds = [0, 1, 42, -1, 2**63 - 1, -(2**63), 2**32, 123456789012345]
    positions = [0, 1, 2**31, 131071, 5, 7, 2**40, 3]
    keys = sampling._row_keys(torch.tensor(seeds, device=device), torch.tensor(positions, device=device))
    hashed = sampling._hash(torch.arange(1003, dtype=torch.int32, device=device), keys[:, :1], keys[:, 1:])
    expected = [
        [python_hash(seed, position, token) for token in range(1003)]
        for seed, position in zip(seeds, positions, strict=True)
    ]
    assert hashed.tolist() == expected


@devices
def test_gumbel_is_finite_and_falls_with_the_hash(device: str) -> None:
    edges = [0, 1, 2, 2**30, 2**31 - 130, 2**31 - 2, 2**31 - 1]
    noise = sampling._gumbel_of_hash(torch.tensor(edges, dtype=torch.int32, device=device)).double().cpu()
    assert noise.isfinite().all()
    assert (noise.diff() <= 0).all()
    # Where the hash is high, u is near 1 and the noise low: such a token loses, and fp32 is coarse there.
    exact = [-math.log(-math.log1p(-(value + 0.5) / 2**31)) for value in edges[:4]]
    torch.testing.assert_close(noise[:4], torch.tensor(exact).double(), rtol=1e-6, atol=1e-6)
    assert noise.max() < 22.3
    assert noise.min() > -2.9


def gumbel_rows(seeds: Tensor, positions: Tensor, vocab: int) -> Tensor:
    keys = sampling._row_keys(seeds, positions)
    return sampling._gumbel(torch.arange(vocab, dtype=torch.int32), keys[:, :1], keys[:, 1:]).double()


def test_noise_has_the_gumbel_distribution_in_every_direction() -> None:
    count = 49152
    zeros = torch.zeros(count, dtype=torch.long)
    steps = torch.arange(count)
    along_tokens = gumbel_rows(torch.tensor([DEFAULT_SEED]), torch.tensor([7]), count)[0]
    along_positions = gumbel_rows(zeros + DEFAULT_SEED, steps, 4)[:, 3]
    along_seeds = gumbel_rows(steps, zeros + 12, 4)[:, 3]
    for noise in (along_tokens, along_positions, along_seeds):
        cdf = torch.exp(-torch.exp(-noise.sort().values))
        distance = (cdf - (torch.arange(count) + 0.5) / count).abs().max()
        assert distance < 1.95 / math.sqrt(count)  # Kolmogorov-Smirnov at 0.1%


def test_noise_of_neighbours_is_uncorrelated() -> None:
    """Adjacent positions, adjacent seeds, swapped seed and position, shifted token ids."""
    vocab = 49152
    seeds = torch.tensor([42, 42, 43, 7, 43, 42])
    positions = torch.tensor([7, 8, 7, 42, 6, 7 + 2**32])
    uniform = torch.exp(-torch.exp(-gumbel_rows(seeds, positions, vocab))) - 0.5
    bound = 4.5 / math.sqrt(vocab)
    for first in range(len(seeds)):
        for second in range(first, len(seeds)):
            for shift in (0, 1, 2, 8, 1024):
                if first == second and shift == 0:
                    continue
                product = uniform[first, shift:] * uniform[second, : vocab - shift]
                assert abs(product.mean() * 12) < bound, (first, second, shift)


def chi_square_is_plausible(counts: Tensor, probabilities: Tensor) -> bool:
    """Whether counts fit the probabilities: the statistic stays below mean + 4.5 standard deviations."""
    expected = probabilities * counts.sum()
    statistic = ((counts - expected) ** 2 / expected).sum()
    degrees = len(probabilities) - 1
    return bool(statistic < degrees + 4.5 * math.sqrt(2 * degrees))


DRAWS = 20_000


@pytest.mark.parametrize("vary", ["seed", "position"])
@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1.0},
        {"temperature": 0.6},
        {"temperature": 2.0, "top_k": 5},
        {"temperature": 1.5, "top_p": 0.8},
        {"temperature": 2.0, "min_p": 0.2},
        {"temperature": 2.0, "top_k": 9, "top_p": 0.9, "min_p": 0.05},
    ],
)
def test_tokens_follow_the_renormalised_softmax(params: dict[str, float], vary: str) -> None:
    logits = random_logits(1, 17, 3) / 2
    seeds = range(DRAWS) if vary == "seed" else [DEFAULT_SEED] * DRAWS
    positions = torch.arange(DRAWS) if vary == "position" else torch.full((DRAWS,), 9)
    rows = SamplingRows.from_params([RowParams(**params, seed=seed) for seed in seeds])  # type: ignore[arg-type]
    tokens = sampling._sample_batched(logits.expand(DRAWS, -1), rows, positions, None)
    head = SamplingRows.from_params(rows.params[:300])
    assert torch.equal(sample(logits.expand(300, -1), head, positions[:300]), tokens[:300])

    scaled = logits / rows.temperature[:1]
    keep = sampling._keep_mask(scaled, rows.top_k[:1], rows.top_p[:1], rows.min_p[:1])[0]
    counts = torch.bincount(tokens, minlength=17)
    assert counts[~keep].sum() == 0
    probabilities = scaled[0].double().masked_fill(~keep, -math.inf).softmax(0)[keep]
    assert len(probabilities) == 17 or len(params) > 1
    assert chi_square_is_plausible(counts[keep].double(), probabilities)
    if len(probabilities) < 17:
        # The test itself can fail: the untruncated distribution does not fit.
        assert not chi_square_is_plausible(counts.double(), scaled[0].double().softmax(0))


def test_consecutive_tokens_are_independent() -> None:
    logits = torch.tensor([[0.0, 0.5, 1.0, -0.5]])
    rows = SamplingRows.from_params([RowParams()] * DRAWS)
    tokens = sampling._sample_batched(logits.expand(DRAWS, -1), rows, torch.arange(DRAWS), None)
    pairs = torch.bincount(tokens[:-1:2] * 4 + tokens[1::2], minlength=16).double()
    single = logits[0].double().softmax(0)
    assert chi_square_is_plausible(pairs, torch.outer(single, single).view(-1))


# Parameters


def test_row_params_follow_sglang() -> None:
    assert RowParams(top_k=-1).top_k == TOP_K_ALL
    assert RowParams(temperature=0.0, top_p=0.5).greedy
    assert RowParams(temperature=1e-7).greedy
    assert RowParams(temperature=0.8, top_k=1).greedy
    assert not RowParams(temperature=1e-5).greedy
    assert not RowParams(temperature=0.0, top_p=0.5, min_p=0.1).truncated
    assert RowParams(min_p=0.1).truncated
    assert not RowParams(min_p=0.1).ordered


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.inf),
        ("temperature", math.nan),
        ("top_k", 0),
        ("top_k", -2),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("seed", 2**63),
        ("seed", -(2**63) - 1),
    ],
)
def test_row_params_refuse_nonsense(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        RowParams(**{field: value})  # type: ignore[arg-type]


def test_what_the_host_knows_of_the_rows() -> None:
    rows = SamplingRows.from_params(CROWD)
    assert rows.sampled_rows.tolist() == [1, 2, 3, 4, 5]
    assert rows.truncated_rows.tolist() == [0, 1, 2, 4]
    assert rows.greedy.tolist() == [True, False, False, False, False, False, True]
    assert rows.any_sampled
    assert rows.any_truncated
    greedy = SamplingRows.from_params([RowParams(temperature=0.0, top_p=0.5)])
    assert not greedy.any_sampled
    assert not greedy.any_truncated


def test_shapes_are_checked() -> None:
    rows = SamplingRows.from_params(CROWD[:2])
    for logits, positions in [
        (torch.zeros(3, 9), torch.zeros(3)),
        (torch.zeros(2, 9), torch.zeros(1)),
        (torch.zeros(9), torch.zeros(2)),
    ]:
        with pytest.raises(ValueError, match="do not fit together"):
            sample(logits, rows, positions)


def test_logits_are_left_alone() -> None:
    logits = random_logits(7, 1000)
    before = logits.clone()
    sample(logits, SamplingRows.from_params(CROWD), torch.arange(7))
    log_softmax(logits)
    assert torch.equal(logits, before)


def test_derived_seeds() -> None:
    assert derive_seed(42, 0) == 42
    seeds = [derive_seed(seed, index) for seed in range(-5, 50) for index in range(50)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= derive_seed(seed, 1) < 2**63 for seed in (0, -1, 42, 2**63 - 1, -(2**63)))
    # Pinned: a change would change the output of every request with n > 1.
    assert derive_seed(42, 1) == 6839728766377637706
    with pytest.raises(ValueError, match="at least 0"):
        derive_seed(42, -1)


def test_margin_of_greedy_rows() -> None:
    logits = torch.tensor([[1.0, 4.0, 3.5], [2.0, 2.0, 0.0]], dtype=torch.bfloat16)
    rows = SamplingRows.from_params([RowParams(temperature=0.0)] * 2)
    tokens, margins = sample_with_margin(logits, rows, torch.arange(2))
    assert tokens.tolist() == [1, 0]
    assert margins.tolist() == [0.5, 0.0]
    assert margins.dtype == torch.float32


@pytest.mark.parametrize("params", CROWD)
def test_token_wins_up_to_its_margin(params: RowParams) -> None:
    # Lowering the winner's logit by a little less than the margin keeps it, by a little more does not.
    logits = random_logits(8, 300)
    rows = SamplingRows.from_params([params] * 8)
    positions = torch.arange(8)
    tokens, margins = sample_with_margin(logits, rows, positions)
    assert torch.equal(tokens, sample(logits, rows, positions))
    if params.ordered or params.min_p > 0:
        return  # another logit moves the cut as well
    for factor, same in ((0.99, True), (1.01, False)):
        lowered = logits.clone()
        lowered[torch.arange(8), tokens] -= factor * margins + (0 if same else 1e-4)
        assert torch.equal(sample(lowered, rows, positions) == tokens, torch.full((8,), same))


def test_margins_do_not_depend_on_the_path() -> None:
    logits = random_logits(len(CROWD), 300)
    rows = SamplingRows.from_params(CROWD)
    positions = torch.arange(len(CROWD))
    margins = torch.empty(len(CROWD))
    tokens = sampling._sample_batched(logits, rows, positions, margins)
    expected_tokens, expected = sample_with_margin(logits, rows, positions)
    assert torch.equal(tokens, expected_tokens)
    torch.testing.assert_close(margins, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.gpu
def test_no_host_synchronisation_on_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    logits = random_logits(7, 1000).cuda()
    rows = SamplingRows.from_params(CROWD, "cuda")
    positions = torch.arange(7, device="cuda")
    expected = sample(logits.cpu(), SamplingRows.from_params(CROWD), torch.arange(7)).tolist()
    torch.cuda.set_sync_debug_mode("error")
    try:
        tokens = sample(logits, rows, positions)
        log_softmax(logits)
        sample_with_margin(logits, rows, positions)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert tokens.tolist() == expected
