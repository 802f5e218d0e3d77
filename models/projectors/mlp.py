"""The MLP that projects every token of a tower by itself.

Axes: W width of the tower, D width of the language model.
"""

import flax.linen as nn
import jax
from jax.typing import DTypeLike

from models.blocks import ACTIVATIONS, dense, layer_norm

Array = jax.Array
NORM_EPS = 1e-5


class Projector(nn.Module):
  """Two products with an activation between them (arXiv:2310.03744, Sec. 3.2).

  Attributes:
    width: D.
    activation: a name in `ACTIVATIONS`.
    dtype: of the products.
    norm: whether features are normed first (InternVL 1.5, arXiv:2404.16821, as released).
  """

  width: int
  activation: str
  dtype: DTypeLike
  norm: bool = False

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """Projects features: float[..., W] -> float[..., D]."""
    if self.norm:
      x = layer_norm(NORM_EPS, name='norm')(x)
    x = dense(self.width, self.dtype, name='fc1')(x)
    # Longer than a language model's embeddings, tokens would pass through it almost unchanged.
    spread = 0.01 if self.norm else None
    return dense(self.width, self.dtype, name='fc2', spread=spread)(ACTIVATIONS[self.activation](x))
