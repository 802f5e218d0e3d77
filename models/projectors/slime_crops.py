"""SliME over all crops of an image: the image in small, and of its crops what the prompt asks for.

Axes: B batch, F crops, the image in small in front, N patches of a crop, Q queries of a crop, K
tokens of all crops that fit, W width of the tower, D width of the language model.
"""

import math
from typing import Annotated

import flax.linen as nn
import jax.numpy as jnp

from models.projectors.base import IMAGE, TEXT, Array, Beside, Compressor
from models.projectors.mlp import Projector
from models.projectors.slime import Gates, Resampler, weighed
from models.projectors.slime_router import ROUTES, SliMERouter
from ops.primitives.grids import Grid
from ops.tokens import TokenSet
from ops.values import Count, OneOf, Positive, Share, Width


class SliMECrops(Compressor):
  """Keeps an image in small, and of its crops the tokens that the prompt asks for.

  SliME (Zhang et al., 2024), arXiv:2406.08487, as released: `SliME` reads the image in small,
  `SliMELocal` its crops, by the same MLP; then come a separator, and what `SliMERouter` keeps of
  the tokens of all crops, crop after crop (the release's form 'flat'). An image of one crop is that
  in small, without a separator. Differs from the release: at most `capacity` tokens of crops stay,
  so that shapes are static, and the separator is learned, where the release takes the language
  model's embedding of a comma. Parameters of a release are those of `SliME`, and as 'local' the
  'resampler' of `SliMELocal`.

  Attributes:
    side: queries of a crop each way; 12 leave 144.
    heads: of the attention, 128 features each in the release.
    inner: width of the crops' attention, None for W.
    capacity: K.
    route, top_p, temperature: as in `SliMERouter`.
    route_heads: of the router's attention, where its `route` has any.
  """

  side: Count = 12
  heads: Count = 8
  inner: Width | None = None
  capacity: Count = 576
  route: Annotated[str, OneOf(ROUTES)] = 'cosine'
  top_p: Share = 0.95
  temperature: Positive = 1.0
  route_heads: Count = 32

  @property
  def reads(self) -> frozenset[str]:
    """Names the prompt's ids."""
    return frozenset({TEXT})

  @property
  def span(self) -> str:
    """Names all crops of an image."""
    return IMAGE

  def grid_after(self, grid: Grid) -> Grid | None:
    """Returns the grid of an image of one crop; what is left of several is none."""
    return grid if len(grid) == 2 else None

  def slots(self, grid: Grid) -> int:
    """Returns N, and where there are crops the separator and those of their tokens that fit."""
    crops = grid[0] - 1 if len(grid) > 2 else 0
    behind = 1 + min(self.capacity, crops * self.side ** 2) if crops else 0
    return math.prod(grid[-2:]) + behind

  @nn.compact
  def __call__(self, tokens: TokenSet, beside: Beside) -> TokenSet:
    """Compresses, as `Compressor`; with an rng 'dropout' gates and router are noisy.

    Raises:
      ValueError: no prompt where crops are to be chosen from.
    """
    grid, batch = beside.grid[-2:], len(tokens.x)
    x = tokens.x.reshape(batch, -1, math.prod(grid), tokens.x.shape[2])
    mlp = Projector(self.width, 'gelu', self.dtype, name='mlp')
    seen = Resampler(grid, self.heads, self.dtype, name='resampler')(x[:, 0], grid)
    whole = TokenSet.create(weighed(x[:, 0], seen, Gates(name='gates'), mlp))
    crops = x.shape[1] - 1
    if not crops and self.is_initializing():
      self._asked_for(x, jnp.ones(batch, jnp.int32), mlp, beside)
    if not crops:
      return whole
    frames = beside.frames
    if frames is None:
      frames = jnp.full(batch, crops + 1, jnp.int32)
    kept = self._asked_for(x[:, 1:], frames - 1, mlp, beside)
    there = jnp.broadcast_to(frames[:, None] > 0, whole.x.shape[:2])
    return TokenSet.create(jnp.concatenate([whole.x, kept.x], axis=1),
                           valid=jnp.concatenate([there, kept.real], axis=1))

  def _asked_for(self, x: Array, there: Array, mlp: Projector, beside: Beside) -> TokenSet:
    """The separator, and what is kept of crops float[B, F - 1, N, W], the first int32[B] real."""
    if beside.text is None or beside.text_valid is None:
      raise ValueError('SliMECrops keeps of crops what a prompt asks for, and there is no text '
                       'beside the features: give it, or set model.compressor.name=slime')
    batch, crops, _, width = x.shape
    seen = Resampler((self.side,) * 2, self.heads, self.dtype, self.inner, name='local')(
        x.reshape(batch * crops, -1, width), beside.grid[-2:])
    number = jnp.repeat(jnp.arange(crops), self.side ** 2)
    local = TokenSet.create(mlp(seen).reshape(batch, -1, self.width),
                            valid=number[None] < there[:, None])
    kept = SliMERouter(self.capacity, self.route, self.top_p, self.temperature, self.route_heads,
                       self.dtype, name='router')(local, beside.text, beside.text_valid)
    separator = self.param('separator', nn.initializers.normal(0.02), (self.width,))
    apart = jnp.broadcast_to(separator.astype(kept.x.dtype), (batch, 1, self.width))
    some = there[:, None] > 0
    return TokenSet.create(jnp.concatenate([apart, kept.x], axis=1),
                           valid=jnp.concatenate([some, kept.real & some], axis=1))
