"""The hashes by which model managers and CivitAI know a LoRA again, whatever its metadata says (torch-free).

`sshs_model_hash` and `sshs_legacy_hash` are those of kohya's tools (`precalculate_safetensors_hashes`): of the file as
it would be with the `ss_` keys as its only metadata. CivitAI's AutoV3 is the start of the first.
`modelspec.hash_sha256` is of the tensors as they lie in the file (https://github.com/Stability-AI/ModelSpec).
"""

import hashlib
from collections.abc import Mapping

from zimage_train.io import safetensors_format
from zimage_train.io.safetensors_format import TensorEntry

HASH_KEYS = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")
LEGACY_START, LEGACY_BYTES = 0x100000, 0x10000
"""The part of a file that the legacy hash is of; a smaller file has the hash of nothing there."""


def file_hashes(entries: Mapping[str, TensorEntry], metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the value of each of `HASH_KEYS` for a file with these tensors and this metadata."""
    infos = {name: (entry.dtype, entry.shape) for name, entry in entries.items()}
    training_metadata = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    tensors, legacy = hashlib.sha256(), hashlib.sha256()
    header = safetensors_format.encode_header(infos, training_metadata)
    _update_legacy(legacy, header, 0)
    position = len(header)
    for name in safetensors_format.tensor_order(infos):
        data = entries[name].data
        tensors.update(data)
        _update_legacy(legacy, data, position)
        position += len(data)
    digest = tensors.hexdigest()
    return dict(zip(HASH_KEYS, (digest, legacy.hexdigest()[:8], f"0x{digest}"), strict=True))


def _update_legacy(legacy: "hashlib._Hash", chunk: bytes | memoryview, position: int) -> None:
    """Update the legacy hash with what it takes of `chunk`, which stands at `position` in the file."""
    start, end = LEGACY_START - position, LEGACY_START + LEGACY_BYTES - position
    legacy.update(chunk[max(start, 0) : max(end, 0)])
