"""SliME: two experts for an image in small, and queries that compress its crops.

What of the compressed crops a prompt asks for is models/projectors/slime_router.py, and all of an
image together models/projectors/slime_crops.py.

Axes: B batch, N patches of a crop, M queries, W width of the tower, C width of the attention, D
width of the language model.
"""

import math
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from models.blocks import dense, layer_norm
from models.projectors.attention import CrossAttention
from models.projectors.base import Array, Beside, Compressor, Names
from models.projectors.mlp import Projector
from ops.primitives import grids
from ops.primitives.grids import Grid
from ops.tokens import TokenSet
from ops.values import Count, Width

EPS = 1e-6
# Of the gates: what keeps the noise of training, and the sum of the weights, from vanishing.
LEAST_NOISE, LEAST_SUM = 1e-2, 1e-6
MLP: Names = {'mlp/fc1': 'projection.0.*', 'mlp/fc2': 'projection.2.*'}


def _released(prefix: str) -> Names:
  """Returns the names of a `Resampler` in the release."""
  return {f'resampler/{own}': prefix + theirs for own, theirs in (
      ('query', 'query'), ('inner', 'kv_proj.*'), ('norm_query', 'ln_q.*'),
      ('norm_features', 'ln_kv.*'), ('norm_out', 'ln_post.*'),
      ('attention/qkv', 'attn.in_proj_*'), ('attention/out', 'attn.out_proj.*'))}


class SliME(Compressor):
  """Projects every patch, and a query in its place, by one MLP, and lets a gate weigh the two.

  SliME (Zhang et al., 2024), arXiv:2406.08487, as released: what it does to an image in small, and
  to one without crops. It leaves as many tokens as there are patches; `SliMELocal` compresses the
  crops. The release has 576 queries, and falls back to the MLP for another number of patches; here
  there is a query for every patch. Its table of positions is rounded to float16; here it is not.

  Attributes:
    heads: of the attention, 128 features each in the release.
  """

  heads: Count = 8
  released: ClassVar[Names] = {
      **_released('attn.'), **MLP, 'gates/gate': 'w_gate', 'gates/noise': 'w_noise'}

  def grid_after(self, grid: Grid) -> Grid:
    """Returns the grid as it is."""
    return grid

  @nn.compact
  def __call__(self, tokens: TokenSet, beside: Beside) -> TokenSet:
    """Projects, as `Compressor`; with an rng 'dropout' the gates are noisy, as in training."""
    mlp = Projector(self.width, 'gelu', self.dtype, name='mlp')
    seen = Resampler(beside.grid, self.heads, self.dtype, name='resampler')(tokens.x, beside.grid)
    return TokenSet.create(weighed(tokens.x, seen, Gates(name='gates'), mlp))


def weighed(x: Array, seen: Array, gates: nn.Module, mlp: nn.Module) -> Array:
  """Weighs patches and what queries saw in their places: float[B, N, W], twice -> [B, N, D]."""
  experts = jnp.stack([mlp(x), mlp(seen)], axis=-1)
  return jnp.einsum('bnde,bne->bnd', experts, gates(x).astype(experts.dtype))


class SliMELocal(Compressor):
  """Replaces a crop by a square of learned queries, which attend to its patches.

  SliME (Zhang et al., 2024), arXiv:2406.08487, as released: what it does to each crop of an image
  that is read in crops. The MLP is that of `SliME`, so a model that has both reads one set of
  tensors twice. Which tokens of all crops stay is up to `SliMERouter`.

  Attributes:
    side: queries each way; 12 leave 144.
    heads: of the attention, 128 features each in the release.
    inner: C, None for W.
  """

  side: Count = 12
  heads: Count = 8
  inner: Width | None = None
  released: ClassVar[Names] = {**_released('^model.sampler.post_qformer.'), **MLP}

  def grid_after(self, grid: Grid) -> Grid:
    """Returns the square of queries."""
    return (self.side,) * 2

  @nn.compact
  def __call__(self, tokens: TokenSet, beside: Beside) -> TokenSet:
    """Compresses, as `Compressor`."""
    x = Resampler((self.side,) * 2, self.heads, self.dtype, self.inner, name='resampler')(
        tokens.x, beside.grid)
    return TokenSet.create(Projector(self.width, 'gelu', self.dtype, name='mlp')(x))


class Resampler(nn.Module):
  """Lets learned queries attend to features once, both with fixed positions, and no residual.

  Attributes:
    square: rows and columns of the queries.
    heads: of the attention.
    dtype: of the products.
    inner: C, None for W.
  """

  square: Grid
  heads: int
  dtype: DTypeLike
  inner: int | None = None

  @nn.compact
  def __call__(self, x: Array, grid: Grid) -> Array:
    """Attends: float[B, N, W] of a grid -> float[B, M, C]."""
    width = self.inner or x.shape[-1]
    if width != x.shape[-1]:
      x = dense(width, self.dtype, name='inner', bias=False)(x)
    x = layer_norm(EPS, name='norm_features')(x)
    places = jnp.asarray(grids.sincos(self.square, width))[None]
    query = self.param('query', nn.initializers.truncated_normal(0.02),
                       (math.prod(self.square), width))
    query = layer_norm(EPS, name='norm_query')(query)[None] + places
    keys = x + grids.resample(places, self.square, grid, 'bicubic')
    mixed = CrossAttention(self.heads, self.dtype, name='attention')(query, keys, x)
    return layer_norm(EPS, name='norm_out')(mixed)


class Gates(nn.Module):
  """Weighs two experts for every token, by its features; in training with noise."""

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """Weighs: float[B, N, W] -> float32[B, N, 2], which sum to almost 1."""
    shape, zeros = (x.shape[-1], 2), nn.initializers.zeros
    gate, noise = self.param('gate', zeros, shape), self.param('noise', zeros, shape)
    x = x.astype(jnp.float32)
    logits = jnp.matmul(x, gate, precision='highest')
    if self.has_rng('dropout'):
      spread = jax.nn.softplus(jnp.matmul(x, noise, precision='highest')) + LEAST_NOISE
      logits += spread * jax.random.normal(self.make_rng('dropout'), logits.shape)
    weights = jax.nn.softmax(logits, axis=-1)
    return weights / (jnp.sum(weights, axis=-1, keepdims=True) + LEAST_SUM)
