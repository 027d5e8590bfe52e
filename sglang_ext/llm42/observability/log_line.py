"""One line of the commit log: a finished deterministic request with everything needed to run it again.

Torch and SGLang are not imported here; SGLang's objects are only read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sglang_ext.llm42.commit_log import CommitLog
from sglang_ext.llm42.config import REQUEST_KEY

#: Key inside ``SamplingParams.custom_params`` under which the server tells the scheduler which weights a
#: request met; only with ``--llm42-commit-log``.
WEIGHT_VERSION_KEY = "llm42_weight_version"

#: Fields of SGLang's ``SamplingParams`` that say nothing about the output of a request that arrives alone:
#: n (samples reach the scheduler one by one), how output is streamed, and what normalisation has derived.
_LEFT_OUT = frozenset(
    {
        "n",
        "stream_interval",
        "stop_strs",
        "stop_regex_strs",
        "stop_str_max_len",
        "stop_regex_max_len",
        "is_normalized",
    }
)

#: What the scheduler finds in ``custom_params`` and clients did not write.
_NOT_THE_CLIENTS = frozenset({"__req__", REQUEST_KEY, WEIGHT_VERSION_KEY})


@dataclass(frozen=True, slots=True)
class FinishedRequest:
    """A deterministic request that has ended; :meth:`line` may be called in another thread.

    Attributes:
        rid: request id.
        prompt: prompt token ids.
        sampling_params: SGLang's normalised ``SamplingParams``.
        seed: seed of the sampling noise, be it the client's or the default.
        log: what was committed, released.
        finish_reason: as in ``meta_info``.
        weight_version: version of the weights, None if unknown.
        configuration: digest of the server's configuration.
        finished_at: seconds since the epoch.
        further: further fields of ``POST /generate`` that the output depends on.
    """

    rid: str
    prompt: Sequence[int]
    sampling_params: Any
    seed: int
    log: CommitLog
    finish_reason: Mapping[str, Any]
    weight_version: str | None
    configuration: str
    finished_at: float
    further: Mapping[str, Any]

    @property
    def tokens(self) -> int:
        """Token ids in the line."""
        return len(self.prompt) + self.log.num_committed

    def line(self) -> str:
        """The JSON line, without a newline.

        Raises:
            TypeError: a field cannot be expressed in JSON.
        """
        return self.log.to_json_line(
            {
                "rid": self.rid,
                "finished_at": self.finished_at,
                "weight_version": self.weight_version,
                "configuration": self.configuration,
                "input_ids": list(self.prompt),
                "sampling_params": {**client_params(self.sampling_params), "sampling_seed": self.seed},
                **self.further,
                "finish_reason": dict(self.finish_reason),
            }
        )


def client_params(params: Any) -> dict[str, Any]:
    """Sampling parameters as a client would send them to get what the scheduler has in ``params``.

    All of them, defaults too: another server may have other preferred ones.
    """
    fields = {name: getattr(params, name) for name in params.__struct_fields__ if name not in _LEFT_OUT}
    fields["stop"] = list(_strings(params.stop_strs)) or None
    fields["stop_regex"] = list(_strings(params.stop_regex_strs)) or None
    fields["stop_token_ids"] = sorted(params.stop_token_ids or ()) or None
    custom = params.custom_params or {}
    fields["custom_params"] = {k: v for k, v in custom.items() if k not in _NOT_THE_CLIENTS} or None
    return fields


def _strings(value: str | Sequence[str] | None) -> Sequence[str]:
    return [value] if isinstance(value, str) else value or []
