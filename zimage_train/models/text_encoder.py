"""Prompts to embeddings, exactly as the Z-Image pipeline does it, without what it does not use.

The embeddings are `hidden_states[-2]` of Qwen3: the output of its last layer but one. So the last layer, the final
norm and the head are never loaded. Encoding at true length equals encoding padded to 512 tokens.

One layer is on the device at a time, and all prompts go through it before the next one comes: the encoder is read once
however many there are, and takes a thirtieth of its 8 GB.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3RotaryEmbedding

from zimage_train.errors import Problem, WeightsError
from zimage_train.io.headers import TensorInfo
from zimage_train.io.progress import StepProgress
from zimage_train.models import components, loading
from zimage_train.typing import PromptEmbeds

MAX_TOKENS = 512
BATCH_TOKENS = 8192
"""Of one length that go through a layer together."""
GROUP_TOKENS = 200_000
"""Whose states are kept between the layers: 1 GB."""


class TextEncoder:
    """Qwen3 without its last layer, its norm and its head, and the tokenizer that belongs to it."""

    def __init__(
        self,
        config: Qwen3Config,
        tensors: dict[str, TensorInfo],
        tokenizer: PreTrainedTokenizerBase,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self._tensors = tensors
        self._device = device
        self._dtype = dtype

    def tokens(self, prompt: str, most: int | None = MAX_TOKENS) -> list[int]:
        """Token ids of the templated prompt, cut off after `most`: the empty prompt is a templated empty message."""
        message = [{"role": "user", "content": prompt}]
        text = self.tokenizer.apply_chat_template(
            message, tokenize=False, add_generation_prompt=True, enable_thinking=True
        )
        assert isinstance(text, str)
        return self.tokenizer(text, truncation=most is not None, max_length=most)["input_ids"]

    def encode(self, prompt: str) -> PromptEmbeds:
        """The embeddings (tokens, features) of one prompt, at its true length, in the encoder's dtype."""
        return next(self.encode_all([prompt]))[1]

    def encode_all(
        self,
        prompts: Iterable[str],
        tick: StepProgress = lambda done, total: None,
        warn: Callable[[str], None] = lambda text: None,
    ) -> Iterator[tuple[str, PromptEmbeds]]:
        """Every prompt with its embeddings, those of one length together; `warn` is told what is cut off."""
        ids = {prompt: self.tokens(prompt) for prompt in prompts}
        for prompt, found in ids.items():
            if len(found) == MAX_TOKENS and (whole := len(self.tokens(prompt, None))) > MAX_TOKENS:
                warn(f"a caption has {whole} tokens, and the model reads {MAX_TOKENS} of them: {prompt[:60]!r}...")
        groups = list(_groups(sorted(ids, key=lambda prompt: (len(ids[prompt]), prompt)), ids))
        for number, group in enumerate(groups):
            base, total = number * self.config.num_hidden_layers, len(groups) * self.config.num_hidden_layers
            yield from self._encode(group, ids, lambda done, base=base, total=total: tick(base + done, total))

    @torch.no_grad()
    def _encode(
        self, prompts: list[str], ids: dict[str, list[int]], tick: Callable[[int], None]
    ) -> Iterator[tuple[str, PromptEmbeds]]:
        batches = list(_batches(prompts, ids))
        table = self._tensor("embed_tokens.weight")
        states = [table[torch.tensor([ids[prompt] for prompt in batch])].to(self._dtype) for batch in batches]
        del table
        rotary = Qwen3RotaryEmbedding(self.config).to(self._device)
        for index in range(self.config.num_hidden_layers):
            layer = self._layer(index)
            for number, state in enumerate(states):
                there = state.to(self._device)
                places = torch.arange(there.shape[1], device=self._device)[None]
                output = layer(there, position_ids=places, position_embeddings=rotary(there, places))
                states[number] = (output if isinstance(output, Tensor) else output[0]).to(state.device)
            del layer  # before the next one comes
            tick(index + 1)
        for batch, state in zip(batches, states, strict=True):
            yield from ((prompt, one.clone()) for prompt, one in zip(batch, state, strict=True))

    def _layer(self, index: int) -> Qwen3DecoderLayer:
        prefix = f"layers.{index}."
        with init_empty_weights():
            layer = Qwen3DecoderLayer(self.config, index)
        found = {name: info for name, info in self._tensors.items() if _plain(name).startswith(prefix)}
        named = ((_plain(name).removeprefix(prefix), tensor) for name, tensor in loading.stream(found))
        loading.load(layer, named, "text_encoder", self._device, self._dtype)
        return layer.eval()

    def _tensor(self, wanted: str) -> Tensor:
        found = {name: info for name, info in self._tensors.items() if _plain(name) == wanted}
        return next(loading.stream(found))[1]


def _plain(name: str) -> str:
    return name.removeprefix("model.")


def _groups(prompts: list[str], ids: dict[str, list[int]]) -> Iterator[list[str]]:
    """`prompts` cut where the states of more would take too much memory."""
    group: list[str] = []
    held = 0
    for prompt in prompts:
        if group and held + len(ids[prompt]) > GROUP_TOKENS:
            yield group
            group, held = [], 0
        group.append(prompt)
        held += len(ids[prompt])
    if group:
        yield group


def _batches(prompts: list[str], ids: dict[str, list[int]]) -> Iterator[list[str]]:
    """Prompts of one length, as many as go through a layer together; `prompts` are in the order of their length."""
    for length, alike in groupby(prompts, key=lambda prompt: len(ids[prompt])):
        same = list(alike)
        most = max(BATCH_TOKENS // length, 1)
        yield from (same[start : start + most] for start in range(0, len(same), most))


def load(extras: Path, device: torch.device, dtype: torch.dtype) -> TextEncoder:
    """The text encoder and tokenizer of a diffusers folder.

    Raises:
        WeightsError: not a Qwen3, or not exactly its tensors.
    """
    folder = extras / "text_encoder"
    _, found = components.text_encoder(extras)
    try:
        config = Qwen3Config.from_pretrained(folder, local_files_only=True)
        last = config.num_hidden_layers - 1
        config.num_hidden_layers = last
        config.layer_types = config.layer_types[:last] if config.layer_types else None
        config._attn_implementation = "sdpa"
        Qwen3RotaryEmbedding(config)
        with init_empty_weights():
            Qwen3DecoderLayer(config, 0)
    except Exception as error:  # noqa: BLE001  a config that contradicts itself makes the class raise whatever it runs into
        what = f"makes no Qwen3 ({type(error).__name__}: {str(error)[:100]})"
        raise WeightsError(Problem(str(folder / "config.json"), what, "get the file again")) from None
    encoder = TextEncoder(config, found, _tokenizer(components.tokenizer(extras)), device, dtype)
    try:
        encoder.tokens("a prompt")
    except Exception as error:  # noqa: BLE001  the template is a program of its own
        what = f"its chat template fails ({type(error).__name__}: {str(error)[:100]})"
        raise WeightsError(Problem(str(extras / "tokenizer"), what, "get the folder again")) from None
    return encoder


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # noqa: BLE001  tokenizers raises bare Exception for a damaged file
        raise WeightsError(Problem(str(folder), f"cannot be read ({error})", "get the folder again")) from None
    return tokenizer
