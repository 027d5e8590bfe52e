"""The split rule of a server, which learns from its first batches where halves are faster.

Halves are launched kernel by kernel, while an uncut batch usually is one CUDA graph. Where the host is slower
than the GPU, a cut loses, whatever the GPU would gain. How slow the host is depends on the machine and on
what else runs there, so the first batches are cut where the GPU alone would gain, their launches are timed,
and from then on the rule reckons with the host. Not to cut before it has learned would be never to learn.

What is still predicted to win is tried: see :mod:`sglang_ext.tokenweave.trials`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from statistics import fmean
from typing import Any

from sglang_ext.tokenweave.split import Decision, SplitRule
from sglang_ext.tokenweave.trials import Clock, Trials

logger = logging.getLogger(__name__)

#: Microseconds per layer that count for a batch which launched too few steps to be timed. Measured with 20
#: layers of a 70B Llama on four H100 (``docs/benchmarks/tokenweave-llama-70b-tp4.md``): 4.2 to 4.4 ms.
UNTIMED_US = 4300.0

#: Batches to time; the fastest counts, for the first ones may compile something.
BATCHES = 3

#: Fused steps of a layer: two in each half.
STEPS_PER_LAYER = 4

#: Trials have at most so many times their tokens as prefixes: attention to them is in no prediction.
PREFIX_SHARE = 1

#: Of a batch, only so many steps are timed: a host far ahead of the GPU is held up by the full launch queue.
TIMED_STEPS = 10 * STEPS_PER_LAYER


def layer_us(launched: Sequence[float]) -> float | None:
    """Host microseconds per layer, from the seconds at which fused steps were launched; None if too few."""
    times = launched[: TIMED_STEPS + 1]
    if len(times) <= STEPS_PER_LAYER:
        return None
    return 1e6 * STEPS_PER_LAYER * fmean(b - a for a, b in pairwise(times))


class LearnedRule:
    """Chooses cuts by a :class:`SplitRule` and by trial; within one batch equal calls give equal answers.

    Args:
        rule: with compute and communication times; its host time is replaced.
        agree: the largest of all ranks' values, a collective. Every rank observes the same batches, so all
            call it at the same point, and all cut alike afterwards.
        clock: of the device.
    """

    def __init__(self, rule: SplitRule, agree: Callable[[float], float], clock: Clock) -> None:
        self.rule = replace(rule, host_us=0.0)
        self._agree = agree
        self._seen: list[float] = []
        self._known: dict[int, Decision] = {}
        self._trials = Trials(clock, agree, rule.margin)
        #: Tokens of the batch that is a trial, and when it began.
        self._trial: tuple[int, Any] | None = None

    def __call__(self, tokens: int) -> Decision:
        """The cut for a batch of ``tokens``."""
        predicted = self.predicted(tokens)
        if predicted.cut is None:
            return predicted
        halves = self._trials.halves_win(tokens)
        if halves is None:
            halves = self._trial is not None and self._trials.halves_next(tokens)
        if halves:
            return predicted
        return replace(
            predicted, cut=None, reason=f"{tokens} tokens run whole, by trial or until there is one"
        )

    def predicted(self, tokens: int) -> Decision:
        """The cut by prediction alone."""
        if tokens not in self._known:
            self._known[tokens] = self.rule.decide(tokens)
        return self._known[tokens]

    def observe_launches(self, launched: Sequence[float]) -> None:
        """A batch in halves was launched, its fused steps at these seconds; alike on every rank."""
        if len(self._seen) == BATCHES:
            return
        self._seen.append(layer_us(launched) or UNTIMED_US)
        if len(self._seen) < BATCHES:
            return
        host_us = self._agree(min(self._seen))
        logger.info("TokenWeave: the host takes %.0f us to launch a layer in two halves", host_us)
        self.rule = replace(self.rule, host_us=host_us)
        self._known.clear()

    def begin(self, tokens: int, prefix: int) -> None:
        """A batch of ``tokens`` begins, whose sequences continue ``prefix`` tokens; maybe it is a trial."""
        self._trial = None  # of a batch that failed
        if self.predicted(tokens).cut is None or prefix > PREFIX_SHARE * tokens:
            return
        if self._trials.halves_win(tokens) is None:
            self._trial = (tokens, self._trials.clock.mark())

    def end(self, in_halves: bool) -> str | None:
        """The batch that began was launched; alike on every rank.

        Returns:
            What was learned, for the log, if something was.
        """
        trial, self._trial = self._trial, None
        # What was learned of the host meanwhile may have ended the trial.
        if trial is None or self.predicted(trial[0]).cut is None:
            return None
        tokens, begin = trial
        return self._trials.add(tokens, in_halves, begin, self._trials.clock.mark(), self.rule.whole_us)
