"""SliME's router: of the tokens of all crops of an image those that a prompt asks for.

Axes: B batch, N tokens of all crops, K of them that fit, T ids of a prompt, D features.
"""

from typing import Annotated

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from models.blocks import dense, layer_norm
from models.projectors.attention import CrossAttention
from models.projectors.base import Array
from ops import tokens as tk
from ops.attention import HIDDEN_LOGIT
from ops.primitives.match import l2_normalize
from ops.primitives.select import keep_top
from ops.tokens import TokenSet
from ops.values import Count, OneOf, Positive, Share, check_fields

EPS = 1e-5
ROUTES = ('cosine', 'qformer', 'qformer_logits')
NOISE = 0.1


class SliMERouter(nn.Module):
  """Keeps the tokens of an image's crops that carry most of what a prompt asks for.

  The text-guided router of SliME (Zhang et al., 2024), arXiv:2406.08487, as released. It stands
  behind `SliMELocal` and needs all crops of a row at once: their tokens in one row of a TokenSet,
  invalid ones for crops that are not there, in any order that the language model is to read them
  in (the release joins the crops to one grid in raster order, as `ops.primitives.grids.unwindow`).
  The language model reads the image in small, an embedding as separator, then these.

  Differs from the release: it keeps `capacity` tokens at most, so that shapes are static.

  Attributes:
    capacity: K.
    route: 'cosine', summed over the prompt's ids; 'qformer', a small network, whose scores pass
      one softmax before the one that all routes have; 'qformer_logits', without that first one.
    top_p: the share of all weight that those kept are to exceed.
    temperature: of every softmax.
    heads: of the network's attention, 128 features each in the release.
    dtype: of the products.
  """

  capacity: Count
  route: Annotated[str, OneOf(ROUTES)] = 'cosine'
  top_p: Share = 0.95
  temperature: Positive = 1.0
  heads: Count = 32
  dtype: DTypeLike = jnp.float32

  def __post_init__(self) -> None:
    check_fields(self)
    super().__post_init__()

  @nn.compact
  def __call__(self, tokens: TokenSet, text: Array, text_valid: Array) -> TokenSet:
    """Selects; with an rng 'dropout' the scores are noisy, as in training.

    Args:
      tokens: x float[B, N, D], projected.
      text: float[B, T, D], embeddings of the prompt's ids.
      text_valid: bool[B, T], those that there are.

    Returns:
      x float[B, K, D], the kept tokens in their order, then padding; valid bool[B, K].
    """
    if self.route == 'cosine':
      scores = cosine_sums(tokens.x, text, text_valid)
    else:
      scores = Asked(self.heads, self.dtype, name='asked')(tokens.x, text, text_valid)
    if self.route == 'qformer':
      scores = weigh(tokens, scores, self.temperature)
    if self.has_rng('dropout'):
      scores += NOISE * jax.random.normal(self.make_rng('dropout'), scores.shape)
    return keep_top_p(tokens, weigh(tokens, scores, self.temperature), top_p=self.top_p,
                      capacity=self.capacity)


class Asked(nn.Module):
  """Scores tokens by what of a prompt they attend to."""

  heads: int
  dtype: DTypeLike

  @nn.compact
  def __call__(self, x: Array, text: Array, text_valid: Array) -> Array:
    """Scores float[B, N, D] beside float[B, T, D] -> float32[B, N]."""
    text = layer_norm(EPS, name='norm_text')(text)
    x = CrossAttention(self.heads, self.dtype, name='attention')(
        layer_norm(EPS, name='norm_query')(x), text, text, text_valid)
    x = dense(text.shape[-1] // 4, self.dtype, name='fc1')(layer_norm(EPS, name='norm_out')(x))
    return dense(1, self.dtype, name='fc2')(nn.relu(x))[..., 0].astype(jnp.float32)


def cosine_sums(x: Array, text: Array, text_valid: Array) -> Array:
  """Sums each token's cosines with all ids of a prompt: float[B, N, D] -> float32[B, N]."""
  x, text = (l2_normalize(each.astype(jnp.float32)) for each in (x, text))
  asked = jnp.sum(jnp.where(text_valid[..., None], text, 0.0), axis=1)
  return jnp.einsum('bnd,bd->bn', x, asked, precision='highest')


def weigh(tokens: TokenSet, scores: Array, temperature: float) -> Array:
  """Takes the softmax over the real tokens of a row, float32[B, N] -> float32[B, N]."""
  return jax.nn.softmax(jnp.where(tokens.real, scores / temperature, HIDDEN_LOGIT), axis=1)


def keep_top_p(tokens: TokenSet, weights: Array, *, top_p: float, capacity: int) -> TokenSet:
  """Keeps the heaviest tokens, as few as exceed a share of the weight, in their order.

  Args:
    tokens: N slots.
    weights: float32[B, N], of which those of a row sum to 1.
    top_p: the share.
    capacity: K; of a row that would keep more the lightest go.

  Returns:
    K slots, N where those are fewer.
  """
  capacity = min(capacity, tokens.slots)
  heaviest = -jnp.sort(-weights, axis=1)
  # The first one stays always; another does if those before it do not exceed the share.
  reached = jnp.cumsum(heaviest, axis=1)[:, :-1] <= top_p
  count = 1 + jnp.sum(reached, axis=1, dtype=jnp.int32)
  tokens = tokens.replace(budget=jnp.minimum(count, capacity))
  return tk.reduce(tokens, keep_top(tokens, weights, num_slots=capacity))
