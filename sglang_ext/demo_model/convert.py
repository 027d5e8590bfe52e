"""GGUF to Hugging Face: what transformers reads from the file, and the tokenizer, which it reads wrongly.

transformers 5.12.1 converts the weights and the config of a Llama GGUF correctly. From this file's tokenizer
it makes another one: ``<|im_start|>`` as end of sequence, no splitting of digits, and a SentencePiece
decoder. Hence :func:`write_tokenizer`, which follows the file's own metadata.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

#: ``tokenizer.ggml.pre`` of the file: GPT-2's pre-tokenizer behind a split of every single digit.
PRE_TOKENIZER = "smollm"

#: ``tokenizer.ggml.token_type`` of a control token.
CONTROL_TOKEN = 3


def write_tokenizer(gguf: Path, target: Path) -> None:
    """Write tokenizer, special tokens and chat template of ``gguf`` to the folder ``target``.

    Raises:
        ValueError: the file's tokenizer is not the byte-level BPE that this function knows.
    """
    from gguf import GGUFReader
    from transformers import PreTrainedTokenizerFast

    fields = GGUFReader(gguf).fields

    def value(key: str) -> Any:
        return fields[f"tokenizer.{key}"].contents()

    kind = (value("ggml.model"), value("ggml.pre"))
    if kind != ("gpt2", PRE_TOKENIZER):
        raise ValueError(f"{gguf} has the tokenizer {kind}, expected ('gpt2', {PRE_TOKENIZER!r})")
    tokens = value("ggml.tokens")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_byte_level_bpe(tokens, value("ggml.merges"), value("ggml.token_type")),
        bos_token=tokens[value("ggml.bos_token_id")],
        eos_token=tokens[value("ggml.eos_token_id")],
        pad_token=tokens[value("ggml.padding_token_id")],
        unk_token=tokens[value("ggml.unknown_token_id")],
        chat_template=value("chat_template"),
        clean_up_tokenization_spaces=False,
        model_max_length=fields["llama.context_length"].contents(),
    )
    tokenizer.save_pretrained(target)


def _byte_level_bpe(tokens: list[str], merges: list[str], types: list[int]) -> Any:
    """A ``tokenizers.Tokenizer``; ``tokens`` and ``types`` go by token id, a merge is ``"left right"``."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {token: index for index, token in enumerate(tokens)}
    pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return tokenizer


def write_model(gguf: Path, target: Path) -> None:
    """Write config, generation config and bf16 safetensors of ``gguf`` to the folder ``target``."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    vars(model.config).pop("_model_name_or_path", None)  # the name of a training run
    model.save_pretrained(target)
