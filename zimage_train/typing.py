"""Shapes of tensors in signatures: a name stands for the same size in all arguments of a call.

b: samples, c: channels, h and w: height and width in latents. The tests check them; a run does not.
"""

from jaxtyping import Float
from torch import Tensor

LatentBatch = Float[Tensor, "b c h w"]
"""Latents, noise, velocities."""
Latent = Float[Tensor, "c h w"]
WeightMaps = Float[Tensor, "b 1 h w"]
"""Loss weights of the positions in latents."""
WeightMap = Float[Tensor, "1 h w"]
PixelBatch = Float[Tensor, "b 3 height width"]
"""RGB in [-1, 1]."""
PixelImage = Float[Tensor, "3 height width"]
PerSample = Float[Tensor, "b"]
"""Sigmas, or weights."""
AnyShape = Float[Tensor, "*shape"]
"""Any shape, the same for all arguments of this type."""
Scalar = Float[Tensor, ""]
PromptEmbeds = Float[Tensor, "_ features"]
"""Embeddings of a prompt, with any number of tokens."""
LoraA = Float[Tensor, "rank inputs"]
"""Factor A of a LoRA."""
LoraB = Float[Tensor, "outputs rank"]
"""Factor B of a LoRA."""
Weight = Float[Tensor, "outputs inputs"]
