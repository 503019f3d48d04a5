"""The tokenizer and the text encoder: Qwen's classes and template, with the world's words as tokens."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from miniature import world

CHAT_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""
"""What Qwen3's template does with plain messages."""


def make_tokenizer(folder: Path) -> None:
    """Trains byte-level BPE with Qwen's splitting on captions of the world: its words become tokens.

    Captions with made-up words are left out, so such a word, and `zorb`, is spelt with letters.
    """
    raw = Tokenizer(models.BPE())
    raw.normalizer = normalizers.NFC()
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        min_frequency=20,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    scenes = [world.world_scene(seed) for seed in range(6000)]
    captions = [world.caption(shown, 128, 128) for shown in scenes if shown.called is None]
    raw.train_from_iterator(captions + ["user\n", "assistant\n"] * 100, trainer)
    merges = json.loads(raw.to_str())["model"]["merges"]
    tokenizer = Qwen2Tokenizer(
        vocab=raw.get_vocab(),
        merges=[tuple(merge) for merge in merges],
        model_max_length=131072,
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
    )
    tokenizer.save_pretrained(folder)


def new_text_encoder(tokenizer: Qwen2Tokenizer) -> Qwen3ForCausalLM:
    """A Qwen3 of four layers, of which Z-Image reads the third; its embeddings outweigh what layers add at first."""
    config = Qwen3Config(
        vocab_size=8 * math.ceil(len(tokenizer) / 8),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=40960,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        rms_norm_eps=1e-6,
        initializer_range=0.08,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen3ForCausalLM(config)
    torch.nn.init.normal_(model.model.embed_tokens.weight)
    return model


def tokens_of(captions: list[str], tokenizer: Qwen2Tokenizer) -> dict[str, list[int]]:
    """The token ids of each caption in the chat template."""
    prompts = {}
    for text in set(captions):
        message = [{"role": "user", "content": text}]
        prompt = tokenizer.apply_chat_template(
            message, tokenize=False, add_generation_prompt=True, enable_thinking=True
        )
        prompts[text] = tokenizer(prompt).input_ids
    return prompts


def features(encoder: Qwen3ForCausalLM, rows: list[list[int]]) -> list[Tensor]:
    """Caption features: the second to last hidden state, a tensor of (tokens, 64) a row, without its padding.

    Rows are padded behind; attention is causal, so no real token sees the padding.
    """
    longest = max(map(len, rows))
    padded = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    states = encoder.model(input_ids=padded, output_hidden_states=True).hidden_states[-2]
    return [states[index, : len(row)] for index, row in enumerate(rows)]
