"""The text encoder: prompts to embeddings, equal to those of diffusers' Z-Image pipeline.

The embeddings are `hidden_states[-2]` of Qwen3, the output of its penultimate layer. So the last layer, the final norm
and the head are never loaded. Encoding a prompt at its true length equals encoding it padded to 512 tokens.

Encoding goes layer by layer: one layer is on the device at a time, and all prompts pass through it before the next
is loaded. So the encoder is read once for any number of prompts, and takes a thirtieth of its 8 GB on the device.
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
from zimage_train.io.progress import StepProgress
from zimage_train.models import components, loading
from zimage_train.models.arch import MAX_PROMPT_TOKENS
from zimage_train.models.components import ExtrasPaths
from zimage_train.models.stored_weights import StoredWeight
from zimage_train.typing import PromptEmbeds

BATCH_TOKENS = 8192
"""Tokens of prompts of equal length that go through a layer as a batch."""
GROUP_TOKENS = 200_000
"""Tokens whose hidden states are kept in CPU memory between layers: 1 GB."""


class TextEncoder:
    """Qwen3 without its last layer, final norm and head, together with its tokenizer."""

    def __init__(
        self,
        config: Qwen3Config,
        weights: dict[str, StoredWeight],
        tokenizer: PreTrainedTokenizerBase,
        device: torch.device,
        dtype: torch.dtype,
        where: str,
    ) -> None:
        """Prepare an encoder of `weights`, which are read from `where`."""
        self.config = config
        self._where = where
        self.tokenizer = tokenizer
        self._weights = weights
        self._device = device
        self._dtype = dtype

    def tokens(self, prompt: str, max_tokens: int | None = MAX_PROMPT_TOKENS) -> list[int]:
        """Return the token ids of the chat message with `prompt`, truncated to `max_tokens`.

        The empty prompt is a message too, with an empty text, as in the pipeline.
        """
        message = [{"role": "user", "content": prompt}]
        text = self.tokenizer.apply_chat_template(
            message, tokenize=False, add_generation_prompt=True, enable_thinking=True
        )
        assert isinstance(text, str)
        return self.tokenizer(text, truncation=max_tokens is not None, max_length=max_tokens)["input_ids"]

    def encode(self, prompt: str) -> PromptEmbeds:
        """Return the embeddings (tokens, features) of a prompt at its true length, in the encoder's dtype."""
        return next(self.encode_all([prompt]))[1]

    def encode_all(
        self,
        prompts: Iterable[str],
        progress: StepProgress = lambda done, total: None,
        warn: Callable[[str], None] = lambda text: None,
    ) -> Iterator[tuple[str, PromptEmbeds]]:
        """Yield (prompt, embeddings), ordered by length; call `warn` for each prompt that is truncated."""
        ids = {prompt: self.tokens(prompt) for prompt in prompts}
        for prompt, token_ids in ids.items():
            if len(token_ids) < MAX_PROMPT_TOKENS:
                continue
            full_length = len(self.tokens(prompt, None))
            if full_length > MAX_PROMPT_TOKENS:
                read = f"the model reads the first {MAX_PROMPT_TOKENS}"
                warn(f"a caption has {full_length} tokens; {read}: {prompt[:60]!r}...")
        groups = list(_groups(sorted(ids, key=lambda prompt: (len(ids[prompt]), prompt)), ids))
        total = len(groups) * self.config.num_hidden_layers
        for number, group in enumerate(groups):
            base = number * self.config.num_hidden_layers
            yield from self._encode(group, ids, lambda done, base=base: progress(base + done, total))

    @torch.no_grad()
    def _encode(
        self, prompts: list[str], ids: dict[str, list[int]], progress: Callable[[int], None]
    ) -> Iterator[tuple[str, PromptEmbeds]]:
        # Prompts of equal length form a batch, so no prompt is padded.
        batches = list(_batches(prompts, ids))
        # Embeddings are looked up on the CPU: the table is 0.8 GB, of which the prompts use a few rows.
        table = self._tensor("embed_tokens.weight")
        states = []
        for batch in batches:
            states.append(table[torch.tensor([ids[prompt] for prompt in batch])].to(self._dtype))
        del table
        rotary = Qwen3RotaryEmbedding(self.config).to(self._device)
        for index in range(self.config.num_hidden_layers):
            layer = self._layer(index)
            for number, state in enumerate(states):
                hidden = state.to(self._device)
                positions = torch.arange(hidden.shape[1], device=self._device)[None]
                output = layer(hidden, position_ids=positions, position_embeddings=rotary(hidden, positions))
                states[number] = (output if isinstance(output, Tensor) else output[0]).to(state.device)
            del layer  # frees its memory before the next layer is loaded
            progress(index + 1)
        for batch, state in zip(batches, states, strict=True):
            for prompt, embeds in zip(batch, state, strict=True):
                # A copy, so that keeping a prompt does not keep the batch.
                yield prompt, embeds.clone()

    def _layer(self, index: int) -> Qwen3DecoderLayer:
        prefix = f"layers.{index}."
        with init_empty_weights():
            layer = Qwen3DecoderLayer(self.config, index)
        weights = {name: weight for name, weight in self._weights.items() if name.startswith(prefix)}
        tensors = ((name.removeprefix(prefix), tensor) for name, tensor in loading.stream_tensors(weights))
        loading.load_parameters(layer, tensors, self._where, self._device, self._dtype)
        return layer.eval()

    def _tensor(self, name: str) -> Tensor:
        return next(loading.stream_tensors({name: self._weights[name]}))[1]


def _groups(prompts: list[str], ids: dict[str, list[int]]) -> Iterator[list[str]]:
    """Split `prompts` into groups whose hidden states fit in memory together."""
    group: list[str] = []
    num_tokens = 0
    for prompt in prompts:
        if group and num_tokens + len(ids[prompt]) > GROUP_TOKENS:
            yield group
            group, num_tokens = [], 0
        group.append(prompt)
        num_tokens += len(ids[prompt])
    if group:
        yield group


def _batches(prompts: list[str], ids: dict[str, list[int]]) -> Iterator[list[str]]:
    """Split `prompts`, which are sorted by length, into batches of equal length."""
    for length, group in groupby(prompts, key=lambda prompt: len(ids[prompt])):
        same_length = list(group)
        batch_size = max(BATCH_TOKENS // length, 1)
        for start in range(0, len(same_length), batch_size):
            yield same_length[start : start + batch_size]


def load_text_encoder(extras: ExtrasPaths, device: torch.device, dtype: torch.dtype) -> TextEncoder:
    """Load the tokenizer, and prepare the text encoder, whose layers are read when used.

    Raises:
        WeightsError: it is not a Qwen3, or does not have exactly its tensors.
    """
    path = extras.text_encoder
    values, weights = components.read_text_encoder(path)
    try:
        config = Qwen3Config.from_dict(values)
        num_layers = config.num_hidden_layers - 1
        config.num_hidden_layers = num_layers
        config.layer_types = config.layer_types[:num_layers] if config.layer_types else None
        config._attn_implementation = "sdpa"
        # Built here once, so that a damaged config is reported on loading.
        Qwen3RotaryEmbedding(config)
        with init_empty_weights():
            Qwen3DecoderLayer(config, 0)
    except Exception as error:  # noqa: BLE001  the class checks nothing and fails in many ways on an inconsistent config
        what = f"does not describe a Qwen3 ({type(error).__name__}: {str(error)[:100]})"
        where = str(path / "config.json" if path.is_dir() else path)
        raise WeightsError(Problem(where, what, "get the file again", "damaged-config")) from None
    components.require_tokenizer(extras.tokenizer)
    encoder = TextEncoder(config, weights, _load_tokenizer(extras.tokenizer), device, dtype, str(path))
    try:
        encoder.tokens("a prompt")
    except Exception as error:  # noqa: BLE001  a chat template is a Jinja program that may raise anything
        what = f"its chat template fails ({type(error).__name__}: {str(error)[:100]})"
        raise WeightsError(Problem(str(extras.tokenizer), what, "get the folder again", "damaged-tokenizer")) from None
    return encoder


def _load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # noqa: BLE001  tokenizers raises a bare Exception for a damaged file
        raise WeightsError(
            Problem(str(folder), f"cannot be read ({error})", "get the folder again", "damaged-file")
        ) from None
    return tokenizer
