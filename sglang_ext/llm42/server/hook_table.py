"""The rows of the hook table for the process that clients talk to (HTTP server or engine).

Two more, for the counters behind ``/llm42_stats``, are the scheduler's.
"""

from __future__ import annotations

from sglang_ext.hook_types import Feature, Hook, Kind

_MANAGER = "sglang.srt.managers.tokenizer_manager.TokenizerManager"
_ENTRYPOINTS = "sglang.srt.entrypoints"
_OPENAI = f"{_ENTRYPOINTS}.openai"
_OLLAMA = f"{_ENTRYPOINTS}.ollama.serving.OllamaServing"
_SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"
_HTTP_SERVER = f"{_ENTRYPOINTS}.http_server"


def _row(
    feature: Feature, target: str, kind: Kind, function: str, why: str, if_imported: str | None = None
) -> Hook:
    return Hook(target, kind, f"sglang_ext.llm42.server.{function}", feature, why, if_imported)


HOOKS: tuple[Hook, ...] = (
    _row(
        Feature.MARKS,
        f"{_MANAGER}.generate_request",
        Kind.AROUND,
        "intake:generate_request",
        "endpoints drop the field is_deterministic; n and max_new_tokens of the wrong type end in a 500",
    ),
    _row(
        Feature.MARKS,
        f"{_MANAGER}._create_tokenized_object",
        Kind.AROUND,
        "intake:create_tokenized_object",
        "SamplingParams has no is_deterministic; every request of every interface passes here",
    ),
    _row(
        Feature.MARKS,
        f"{_OPENAI}.serving_base.OpenAIServingBase.handle_request",
        Kind.AROUND,
        "openai:handle_request",
        "the OpenAI request models drop the field is_deterministic",
    ),
    _row(
        Feature.MARKS,
        f"{_OPENAI}.serving_completions.OpenAIServingCompletion._build_sampling_params",
        Kind.AFTER,
        "openai:build_sampling_params",
        "a list of marks gives each prompt of a batch its own",
    ),
    _row(
        Feature.MARKS,
        f"{_OPENAI}.serving_responses.OpenAIServingResponses.create_responses",
        Kind.AROUND,
        "bodies:create_responses",
        "a stream there hides why a mark is refused",
    ),
    _row(
        Feature.MARKS,
        f"{_ENTRYPOINTS}.anthropic.serving.AnthropicServing.handle_messages",
        Kind.AROUND,
        "bodies:handle_messages",
        "a stream there hides why a mark is refused",
    ),
    _row(
        Feature.MARKS,
        f"{_OLLAMA}.handle_chat",
        Kind.AROUND,
        "bodies:handle_ollama",
        "whatever is refused ends in a 500 there",
    ),
    _row(
        Feature.MARKS,
        f"{_OLLAMA}.handle_generate",
        Kind.AROUND,
        "bodies:handle_ollama",
        "whatever is refused ends in a 500 there",
    ),
    _row(
        Feature.MARKS,
        f"{_OLLAMA}._convert_options_to_sampling_params",
        Kind.AFTER,
        "bodies:ollama_sampling_params",
        "it drops is_deterministic, and gives seed a name that SamplingParams does not know",
    ),
    _row(
        Feature.LLM42_SERVER,
        f"{_MANAGER}._send_one_request",
        Kind.BEFORE,
        "intake:send_one_request",
        "with n > 1 every sample has its own seed",
    ),
    _row(
        Feature.LLM42_SERVER,
        f"{_MANAGER}._handle_batch_output",
        Kind.AROUND,
        "reports:handle_batch_output",
        "SGLang would collect our reports in lists, and give unmarked requests empty ones",
    ),
    _row(
        Feature.LLM42_SERVER,
        f"{_MANAGER}._wait_one_response",
        Kind.AROUND,
        "reports:wait_one_response",
        "meta_info of a marked request shows its newest report",
    ),
    _row(
        Feature.LLM42_SERVER,
        f"{_HTTP_SERVER}._setup_and_run_http_server",
        Kind.BEFORE,
        "endpoints:add_endpoints",
        "/llm42_stats and /reset_llm42_stats",
        if_imported=_HTTP_SERVER,
    ),
    _row(
        Feature.LLM42,
        f"{_SCHEDULER}.get_internal_state",
        Kind.AFTER,
        "internal_state:get_internal_state",
        "the runtime's counters travel with SGLang's own state",
    ),
    _row(
        Feature.LLM42,
        f"{_SCHEDULER}.set_internal_state",
        Kind.AROUND,
        "internal_state:set_internal_state",
        "SGLang refuses keys that it does not know",
    ),
)
