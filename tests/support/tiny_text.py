"""Text encoders and tokenizers of a few thousand weights, made on the spot, for whole pipelines offline."""

from __future__ import annotations

from typing import Any

import torch

WORDS = ["<pad>", "</s>", "<unk>", "<s>"]
WORDS += ["a", "the", "of", "cat", "dog", "bird", "runs", "sits", "dance", "blue"]
PAD, END, UNKNOWN, START = range(4)


def tokenizer(length: int = 77, start: bool = False, cls: Any = None) -> Any:
    """A word tokenizer.

    Args:
        length: Its ``model_max_length``.
        start: Also put ``<s>`` before a prompt, as CLIP does.
        cls: Class of the result; default ``PreTrainedTokenizerFast``.
    """
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(WORDS)}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    template = "<s> $A </s>" if start else "$A </s>"
    special = [("</s>", END), ("<s>", START)] if start else [("</s>", END)]
    model.post_processor = tokenizers.processors.TemplateProcessing(single=template, special_tokens=special)
    return (cls or PreTrainedTokenizerFast)(
        tokenizer_object=model,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        bos_token="<s>",
        model_max_length=length,
    )


def t5(width: int = 16, umt5: bool = False) -> Any:
    """A T5 (or UMT5) encoder with hidden states of ``width``."""
    import transformers

    torch.manual_seed(0)
    config, cls = (
        (transformers.UMT5Config, transformers.UMT5EncoderModel)
        if umt5
        else (transformers.T5Config, transformers.T5EncoderModel)
    )
    sizes = {"vocab_size": 16, "d_model": width, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return cls(config(**sizes)).eval()


def clip(width: int = 32, projection: int | None = None, layers: int = 2, length: int = 77) -> Any:
    """A CLIP text encoder; with its projection where ``projection`` says how wide."""
    import transformers

    torch.manual_seed(0)
    config = transformers.CLIPTextConfig(
        bos_token_id=START,
        eos_token_id=END,
        pad_token_id=PAD,
        hidden_size=width,
        intermediate_size=32,
        num_attention_heads=4,
        num_hidden_layers=layers,
        vocab_size=16,
        hidden_act="gelu",
        projection_dim=projection or width,
        max_position_embeddings=length,
    )
    if projection is None:
        return transformers.CLIPTextModel(config).eval()
    return transformers.CLIPTextModelWithProjection(config).eval()


def llama(width: int = 16, layers: int = 2) -> Any:
    """A Llama without head."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        bos_token_id=START,
        eos_token_id=END,
        pad_token_id=PAD,
        hidden_size=width,
        intermediate_size=32,
        num_attention_heads=4,
        num_hidden_layers=layers,
        vocab_size=16,
    )
    return transformers.LlamaModel(config).eval()
