"""Prompts to embeddings, exactly as the Z-Image pipeline does it, without what it does not use.

The embeddings are `hidden_states[-2]` of Qwen3: the output of its last layer but one. So the last layer, the final
norm and the head are never loaded. Encoding at true length equals encoding padded to 512 tokens.
"""

from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, Qwen3Config, Qwen3Model

from zimage_train.errors import Problem, WeightsError
from zimage_train.model import extras as parts
from zimage_train.model.weights import load as load_weights
from zimage_train.model.weights import stream
from zimage_train.tensors import Embeds

MAX_TOKENS = 512


class TextEncoder:
    """Qwen3 without its last layer, its norm and its head, and the tokenizer that belongs to it."""

    def __init__(self, model: Qwen3Model, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model = model
        self.tokenizer = tokenizer

    def tokens(self, prompt: str) -> list[int]:
        """Token ids of the templated prompt: the empty prompt is a templated empty message."""
        message = [{"role": "user", "content": prompt}]
        text = self.tokenizer.apply_chat_template(
            message, tokenize=False, add_generation_prompt=True, enable_thinking=True
        )
        assert isinstance(text, str)
        return self.tokenizer(text, truncation=True, max_length=MAX_TOKENS)["input_ids"]

    @torch.no_grad()
    def encode(self, prompt: str) -> Embeds:
        """The embeddings (tokens, features) of one prompt, at its true length, in the encoder's dtype."""
        ids = torch.tensor([self.tokens(prompt)], device=self.model.device)
        return self.model(input_ids=ids, use_cache=False).last_hidden_state[0]


def load(extras: Path, device: torch.device, dtype: torch.dtype) -> TextEncoder:
    """Load the text encoder and tokenizer of a diffusers folder.

    Raises:
        WeightsError: not a Qwen3, or not exactly its tensors.
    """
    folder = extras / "text_encoder"
    _, found = parts.text_encoder(extras)
    try:
        config = Qwen3Config.from_pretrained(folder, local_files_only=True)
        last = config.num_hidden_layers - 1
        config.num_hidden_layers = last
        config.layer_types = config.layer_types[:last] if config.layer_types else None
        with init_empty_weights():
            model = Qwen3Model(config)
    except Exception as error:  # a config that contradicts itself makes the class raise whatever it runs into
        what = f"makes no Qwen3 ({type(error).__name__}: {str(error)[:100]})"
        raise WeightsError(Problem(str(folder / "config.json"), what, "get the file again")) from None
    model.register_module("norm", nn.Identity())
    tensors = {name: info for name, info in found.items() if _is_used(name, last)}
    named = ((name.removeprefix("model."), tensor) for name, tensor in stream(tensors))
    load_weights(model, named, str(folder), device, dtype)
    model.rotary_emb.to(device)
    encoder = TextEncoder(model.eval(), _tokenizer(parts.tokenizer(extras)))
    try:
        encoder.tokens("a prompt")
    except Exception as error:  # the template is a program of its own
        what = f"its chat template fails ({type(error).__name__}: {str(error)[:100]})"
        raise WeightsError(Problem(str(extras / "tokenizer"), what, "get the folder again")) from None
    return encoder


def _is_used(name: str, last: int) -> bool:
    return not name.removeprefix("model.").startswith((f"layers.{last}.", "norm.", "lm_head."))


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # tokenizers raises bare Exception for a damaged file
        raise WeightsError(Problem(str(folder), f"cannot be read ({error})", "get the folder again")) from None
    return tokenizer
