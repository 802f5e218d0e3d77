"""BERT and what is built on it: encoders of texts whose norms stand behind the residual sums.

BERT (Devlin et al., 2019), Sec. 3, arXiv:1810.04805; sentence vectors as the mean of the tokens,
Sentence-BERT (Reimers and Gurevych, 2019), Sec. 3, arXiv:1908.10084.

Axes: B batch, T tokens of the longest text, N slots, D width.
"""

from __future__ import annotations

from typing import Annotated

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from models.backbones.vit import OFFERS, Block
from models.blocks import ACTIVATIONS, check_heads, layer_norm
from models.plans.events import Plan
from models.plans.hosts import Host
from models.stack import Outputs, Stack
from ops import values
from ops.tokens import SPECIAL, TEXT, TokenSet

Array = jax.Array

POOLS = ('mean', 'cls')
# [CLS] in front and [SEP] at the end of every text.
SPECIALS = 2


class PostNormBlock(Block):
  """Block that norms the sum of its input and what attention, or the MLP, made of that.

  The norms move the residual stream itself, so that what is added is the way from one to the other:
  a token that skips a layer stays as it is.
  """

  def entering(self, x: Array, branch: int) -> Array:
    """Returns the features as they are."""
    del branch
    return x

  def residual(self, x: Array, made: Array, branch: int) -> Array:
    """Returns how the normed sum differs from the features."""
    made = super().residual(x, made, branch)
    whole = x.astype(jnp.float32)
    normed: Array = (self.norm1, self.norm2)[branch](whole + made.astype(jnp.float32))
    return normed - whole


class Bert(nn.Module):
  """Token ids to features of every token, and one vector a text.

  Attributes:
    width, depth, mlp, heads: as in ViT.
    vocabulary: number of token ids.
    context: most tokens of a text.
    types: kinds of sentences that the model tells apart; every text is of the first.
    pool: what stands for a text: 'mean', of its tokens, each as often as it stands for some; or
      'cls', its first.
    activation, norm_eps, dtype, implementation, plan, mesh, remat, capture: as in ViT.
  """

  width: values.Width
  depth: values.Depth
  mlp: values.Width
  heads: values.Count
  vocabulary: values.Count
  context: values.Count
  types: values.Count = 2
  pool: Annotated[str, values.OneOf(POOLS)] = 'mean'
  activation: Annotated[str, values.OneOf(ACTIVATIONS)] = 'gelu'
  dropout: values.Rate = 0.0
  norm_eps: values.NotNegative = 1e-12
  dtype: DTypeLike = jnp.float32
  implementation: str = 'xla'
  plan: Plan | None = None
  mesh: Mesh | None = None
  remat: str = 'none'
  capture: bool = False

  def __post_init__(self) -> None:
    values.check_fields(self)
    check_heads(self.width, self.heads)
    super().__post_init__()

  def host(self, slots: int) -> Host:
    """Describes this model to plans, for texts of so many tokens; [CLS] and [SEP] are protected."""
    return Host(self.depth, slots, SPECIALS, OFFERS - {'grid'} | {'cls_attention', 'cls_logits'})

  @nn.compact
  def __call__(self, ids: Array, valid: Array | None = None) -> tuple[Array, Outputs]:
    """Encodes texts.

    Args:
      ids: int[B, T], T at most `context`; each text begins with [CLS] and ends with [SEP].
      valid: bool[B, T], False for padding behind a text; None for none.

    Returns:
      Features float32[B, D], and a dict: 'tokens' (the final TokenSet, whose x the last layer has
      normed), with `capture` 'embedded' float[B, T, D], and what models/stack.py adds.

    Raises:
      ValueError: ids or a mask of another shape or dtype.
    """
    self._check(ids, valid)
    tokens = self._embed(ids, valid)
    embedded = tokens.x
    block = PostNormBlock(self.width, self.heads, self.mlp, self.dropout, self.norm_eps, self.dtype,
                          self.implementation, self.mesh, self.activation, parent=None)
    tokens, out = Stack(block, self.depth, self.plan, None, self.remat, self.mesh, self.capture,
                        name='stack')(tokens)
    out['tokens'] = tokens
    if self.capture:
      out['embedded'] = embedded
    return self._pooled(tokens), out

  def _check(self, ids: Array, valid: Array | None) -> None:
    if ids.ndim != 2 or not jnp.issubdtype(ids.dtype, jnp.integer) or (
        not SPECIALS <= ids.shape[1] <= self.context):
      raise ValueError(f'token ids of shape {ids.shape} and dtype {ids.dtype} do not fit: expected '
                       f'integers [batch, {SPECIALS} to {self.context}]; shorten the text')
    if valid is not None and valid.shape != ids.shape:
      raise ValueError(f'a mask of shape {valid.shape} does not fit token ids of shape {ids.shape}')

  def _embed(self, ids: Array, valid: Array | None) -> TokenSet:
    normal = nn.initializers.normal(0.02)
    table = self.param('table', normal, (self.vocabulary, self.width))
    pos = self.param('pos', normal, (1, self.context, self.width))
    types = self.param('types', normal, (self.types, self.width))
    slots = ids.shape[1]
    x = jnp.asarray(table)[ids] + pos[:, :slots] + types[None, :1]
    x = layer_norm(self.norm_eps, name='norm')(x).astype(self.dtype)
    x = nn.Dropout(self.dropout)(x, deterministic=not self.has_rng('dropout'))
    iota = jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32), ids.shape)
    count = slots if valid is None else jnp.sum(valid, axis=1, keepdims=True, dtype=jnp.int32)
    special = (iota == 0) | (iota == count - 1)
    kind = jnp.where(special, SPECIAL, TEXT).astype(jnp.int8)
    return TokenSet.create(x, pos=iota, kind=kind, valid=valid, of=(TEXT,), protected=SPECIALS)

  def _pooled(self, tokens: TokenSet) -> Array:
    x = tokens.x.astype(jnp.float32)
    if self.pool == 'cls':
      return x[:, 0]
    sizes = tokens.sizes[:, :, None]
    return jnp.sum(jnp.where(sizes > 0, x, 0.0) * sizes, axis=1) / jnp.sum(sizes, axis=1)
