"""Shapes in signatures: each letter is one size within a call. Tests check them; a run does not.

b samples, c channels, h and w in latents.
"""

from jaxtyping import Float
from torch import Tensor

LatentBatch = Float[Tensor, "b c h w"]
"""Latents, noise, velocities."""
Latent = Float[Tensor, "c h w"]
WeightMaps = Float[Tensor, "b 1 h w"]
"""Weights of places in latents."""
WeightMap = Float[Tensor, "1 h w"]
PixelBatch = Float[Tensor, "b 3 height width"]
"""RGB in [-1, 1]."""
PixelImage = Float[Tensor, "3 height width"]
PerSample = Float[Tensor, "b"]
"""Sigmas, or weights."""
AnyShape = Float[Tensor, "*shape"]
"""Of any shape, and the same for all that are called so."""
Scalar = Float[Tensor, ""]
PromptEmbeds = Float[Tensor, "_ features"]
"""A prompt, of any number of tokens."""
LoraA = Float[Tensor, "rank inputs"]
"""A of a LoRA."""
LoraB = Float[Tensor, "outputs rank"]
"""B of a LoRA."""
Weight = Float[Tensor, "outputs inputs"]
