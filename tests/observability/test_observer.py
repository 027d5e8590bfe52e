"""Prometheus metrics, and what the scheduler tells them and the commit log."""

from __future__ import annotations

import json
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import prometheus_client
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from logs import finished

from sglang_ext.llm42.observability import log_line
from sglang_ext.llm42.observability import metrics as metrics_module
from sglang_ext.llm42.observability import observer as observer_module
from sglang_ext.llm42.observability.metrics import COUNTERS, INTERVAL_S, Metrics
from sglang_ext.llm42.observability.observer import Observer
from sglang_ext.llm42.statistics import Statistics

LABELS = {"model_name": "m", "tp_rank": 0, "dp_rank": 1}


class _Registry:
    """Prometheus classes of a registry of their own, and reading it."""

    def __init__(self) -> None:
        self.registry = prometheus_client.CollectorRegistry()

    def counter(self, **kwargs: Any) -> Any:
        return prometheus_client.Counter(**kwargs, registry=self.registry)

    def gauge(self, **kwargs: Any) -> Any:
        return prometheus_client.Gauge(**kwargs, registry=self.registry)

    def value(self, name: str) -> float | None:
        return self.registry.get_sample_value(name, {k: str(v) for k, v in LABELS.items()})

    def figures(self) -> dict[str, float | None]:
        return {field: self.value(name) for field, (name, _) in COUNTERS.items()}


class _Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def _metrics(registry: _Registry, clock: _Clock) -> Metrics:
    return Metrics(LABELS, registry.counter, registry.gauge, clock)


def test_every_metric_is_shown_from_the_start() -> None:
    registry = _Registry()
    _metrics(registry, _Clock())
    assert set(registry.figures().values()) == {0.0}
    for name, _ in (metrics_module.RUNNING, metrics_module.LINES, metrics_module.DROPPED):
        assert registry.value(name) == 0.0
    assert registry.value(metrics_module.ACCEPTING[0]) == 1.0


def test_counters_show_totals_through_resets() -> None:
    registry, clock, statistics = _Registry(), _Clock(), Statistics()
    metrics = _metrics(registry, clock)
    statistics.rollbacks, statistics.padded_rows = 3, 50
    metrics.update(statistics, running=0)
    statistics.rollbacks = 5
    statistics.reset()  # two rollbacks were not shown yet
    statistics.rollbacks = 1
    metrics.update(statistics, running=0)
    assert statistics.rollbacks == 1
    assert registry.value("sglang:llm42_rollbacks_total") == 6
    assert registry.value("sglang:llm42_padded_rows_total") == 50


@settings(deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.sampled_from(sorted(COUNTERS)), st.integers(0, 9)),
            st.just("reset"),
            st.just("update"),
            st.just("wait"),
        )
    )
)
def test_counters_never_decrease_and_end_at_the_totals(events: list[Any]) -> None:
    registry, clock, statistics = _Registry(), _Clock(), Statistics()
    metrics = _metrics(registry, clock)
    counted = dict.fromkeys(COUNTERS, 0)
    shown = registry.figures()
    for event in events:
        if event == "reset":
            statistics.reset()
        elif event == "wait":
            clock.now += INTERVAL_S
        elif event == "update":
            metrics.update(statistics, running=1)
        else:
            field, increase = event
            setattr(statistics, field, getattr(statistics, field) + increase)
            counted[field] += increase
        before, shown = shown, registry.figures()
        assert all((shown[field] or 0) >= (before[field] or 0) for field in COUNTERS)
    metrics.update(statistics, running=0)
    assert registry.figures() == counted


def test_updates_are_rare_while_requests_run_and_sure_when_the_last_ends() -> None:
    registry, clock, statistics = _Registry(), _Clock(), Statistics()
    metrics = _metrics(registry, clock)
    metrics.update(statistics, running=2)
    assert registry.value("sglang:llm42_num_running_reqs") == 2
    statistics.rollbacks = 1
    clock.now += INTERVAL_S / 2
    metrics.update(statistics, running=3)
    assert registry.value("sglang:llm42_rollbacks_total") == 0
    clock.now += INTERVAL_S
    metrics.update(statistics, running=3)
    assert registry.value("sglang:llm42_rollbacks_total") == 1
    statistics.rollbacks = 2
    metrics.update(statistics, running=0)
    assert registry.value("sglang:llm42_rollbacks_total") == 2
    assert registry.value("sglang:llm42_num_running_reqs") == 0


def test_names_are_sglangs_style() -> None:
    rows = [
        *COUNTERS.values(),
        *(metrics_module.ACCEPTING, metrics_module.RUNNING, metrics_module.LINES, metrics_module.DROPPED),
    ]
    assert len({name for name, _ in rows}) == len(rows)
    assert all(name.startswith("sglang:llm42_") and text.endswith(".") for name, text in rows)
    assert set(COUNTERS) <= set(Statistics().as_dict())


# The observer


class _Prometheus:
    """SGLang's collector as far as ours reads it, with a registry of its own."""

    def __init__(self) -> None:
        self.registry = _Registry()
        self.labels = LABELS
        self._counter_cls = self.registry.counter
        self._gauge_cls = self.registry.gauge


def _scheduler(path: Path | None, *, collector: Any = None, tp_rank: int = 0, dp_size: int = 1) -> Any:
    hf_config = types.SimpleNamespace(to_dict=lambda: {"hidden_size": 8, "_name_or_path": "/here"})
    runner = types.SimpleNamespace(
        dtype="bfloat16", device="cpu", model_config=types.SimpleNamespace(hf_config=hf_config)
    )
    return types.SimpleNamespace(
        server_args=types.SimpleNamespace(
            llm42_commit_log=None if path is None else str(path),
            llm42_commit_log_max_bytes=10_000,
            llm42_commit_log_keep=2,
            dp_size=dp_size,
        ),
        ps=types.SimpleNamespace(tp_rank=tp_rank, dp_rank=1 if dp_size > 1 else None),
        tp_worker=types.SimpleNamespace(model_runner=runner),
        metrics_collector_context=types.SimpleNamespace(
            current_scheduler_metrics_enabled=collector is not None, collector=collector
        ),
    )


@pytest.fixture
def endings(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What observers would call at the end of the process; called at the end of the test."""
    calls: list[Any] = []
    monkeypatch.setattr(observer_module.atexit, "register", calls.append)
    yield calls
    for call in calls:
        call()


def _finish(observer: Observer, output: list[int], **params: Any) -> None:
    request = finished(output, **params)
    custom = {"llm42": True, log_line.WEIGHT_VERSION_KEY: "w9"}
    request.sampling_params.custom_params = custom
    req = types.SimpleNamespace(
        rid="a",
        origin_input_ids=request.prompt,
        sampling_params=request.sampling_params,
        custom_logit_processor=None,
        require_reasoning=False,
    )
    state: Any = types.SimpleNamespace(seed=3, log=request.log)
    observer.finished(req, state, request.finish_reason)  # type: ignore[arg-type]


def _runtime() -> Any:
    return types.SimpleNamespace(statistics=Statistics(), num_running=0)


def test_finished_requests_are_logged_and_counted(tmp_path: Path, endings: list[Any]) -> None:
    collector, runtime = _Prometheus(), _runtime()
    path = tmp_path / "log.jsonl"
    observer = Observer.of_scheduler(_scheduler(path, collector=collector, dp_size=2), runtime)
    runtime.statistics.rollbacks = 4
    _finish(observer, [1, 2, 3])
    _finish(observer, [1], max_new_tokens=0)  # as SGLang itself sends to cache a prompt
    endings[0]()
    (line,) = (tmp_path / "log.dp1.jsonl").read_text().splitlines()
    fields = json.loads(line)
    assert fields["rid"] == "a" and fields["weight_version"] == "w9"
    assert fields["configuration"] == observer.configuration_digest
    assert fields["sampling_params"]["sampling_seed"] == 3
    assert collector.registry.value("sglang:llm42_commit_log_lines_total") == 1
    assert collector.registry.value("sglang:llm42_commit_log_dropped_lines_total") == 0
    assert collector.registry.value("sglang:llm42_rollbacks_total") == 4


def test_dropped_lines_are_counted(tmp_path: Path, endings: list[Any]) -> None:
    collector = _Prometheus()
    path = tmp_path / "log.jsonl"
    path.symlink_to("/dev/full")
    observer = Observer.of_scheduler(_scheduler(path, collector=collector), _runtime())
    _finish(observer, [1, 2, 3])
    endings[0]()
    assert collector.registry.value("sglang:llm42_commit_log_lines_total") == 0
    assert collector.registry.value("sglang:llm42_commit_log_dropped_lines_total") == 1


def test_refusal_of_deterministic_requests_is_shown() -> None:
    collector = _Prometheus()
    observer = Observer.of_scheduler(_scheduler(None, collector=collector), _runtime())
    for accepted in (False, True):
        observer.accepting(accepted)
        observer.step_done()
        assert collector.registry.value("sglang:llm42_accepting_reqs") == accepted


def test_only_the_first_tensor_parallel_rank_writes(tmp_path: Path, endings: list[Any]) -> None:
    observer = Observer.of_scheduler(_scheduler(tmp_path / "log", tp_rank=1), _runtime())
    _finish(observer, [1, 2, 3])
    assert endings == [] and list(tmp_path.iterdir()) == []


def test_nothing_happens_where_nothing_was_asked_for() -> None:
    runtime = types.SimpleNamespace()  # nothing of it is read
    observer = Observer.of_scheduler(_scheduler(None), runtime)  # type: ignore[arg-type]
    observer.step_done()
    observer.accepting(False)
    _finish(observer, [1, 2, 3])
