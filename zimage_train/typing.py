"""Shapes in signatures: each letter is one size within a call. Tests check them; a run does not.

b samples, c channels, h and w in latents.
"""

from jaxtyping import Float
from torch import Tensor

Images = Float[Tensor, "b c h w"]
"""Latents, noise, velocities."""
Image = Float[Tensor, "c h w"]
Maps = Float[Tensor, "b 1 h w"]
"""Weights of places in latents."""
Map = Float[Tensor, "1 h w"]
Pixels = Float[Tensor, "b 3 height width"]
"""RGB in [-1, 1]."""
OnePicture = Float[Tensor, "3 height width"]
PerSample = Float[Tensor, "b"]
"""Sigmas, or weights."""
Values = Float[Tensor, "*shape"]
"""Of any shape, and the same for all that are called so."""
Scalar = Float[Tensor, ""]
Embeds = Float[Tensor, "_ features"]
"""A prompt, of any number of tokens."""
Down = Float[Tensor, "rank inputs"]
"""A of a LoRA."""
Up = Float[Tensor, "outputs rank"]
"""B of a LoRA."""
Dense = Float[Tensor, "outputs inputs"]
