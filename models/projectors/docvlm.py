"""DocVLM: learned queries read the text of a page inside its encoder, and stand for all of it.

Axes: B batch, T tokens of text, M queries, E width of the encoder, D width of the language model.
"""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike

from models.blocks import dense
from models.projectors.base import Array
from models.stack import Stack
from ops.tokens import SPECIAL, TEXT, TokenSet
from ops.values import Count, Width, check_fields


class DocVLM(nn.Module):
  """Reads a page's text by learned queries that stand behind it in an encoder, and projects these.

  DocVLM (Nacson et al., 2024), arXiv:2412.08746, which published 64 queries and no code. From its
  abstract, and from accounts of it: an encoder of text and layout (DocFormerV2 without images),
  queries that run through it with the text, and one product to the width of the language model,
  which reads them beside an image of low resolution, itself as it was. Ours: queries start as
  `spread` says, have the places behind the text, whatever the encoder makes of that, and are seen
  by the text as it sees itself.

  It takes no patches, so it is no `Compressor`. Its tokens join a sequence as an image's do:
  `ops.splice.splice(…, Visual(tokens.x[:, None]))`.

  Attributes:
    width: D.
    encoder: what runs over text and queries, each of which must see all real tokens, as blocks with
      mask='full' do (models/backbones/lm.py); its norm, if it has any, is the caller's.
    queries: M.
    spread: of the queries at first, which should be that of the encoder's embeddings.
    dtype: of the product.
  """

  width: Width
  encoder: Stack
  queries: Count = 64
  spread: float = 0.02
  dtype: DTypeLike = jnp.float32

  def __post_init__(self) -> None:
    check_fields(self)
    if self.encoder.causal or self.encoder.block.is_causal:
      raise ValueError('DocVLM reads text by queries behind it and lets text see them, and this '
                       "encoder is causal: give one whose blocks see everything, as mask='full'")
    super().__post_init__()

  @nn.compact
  def __call__(self, x: Array, valid: Array | None = None) -> TokenSet:
    """Reads.

    Args:
      x: float[B, T, E], embeddings of a page's words with their layout, and of a question where the
        queries are to know it.
      valid: bool[B, T], False for padding, on any side; None for none.

    Returns:
      x float[B, M, D].
    """
    batch, length, width = x.shape
    query = self.param('query', nn.initializers.normal(self.spread), (self.queries, width))
    query = jnp.broadcast_to(query.astype(x.dtype), (batch, *query.shape))
    real = jnp.ones((batch, length), bool) if valid is None else valid
    # A row's queries stand directly behind its own text.
    place = jnp.maximum(jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1, 0)
    behind = real.sum(axis=1, dtype=jnp.int32)[:, None] + jnp.arange(self.queries)[None]
    kind = jnp.where(jnp.arange(length + self.queries) < length, TEXT, SPECIAL).astype(jnp.int8)
    tokens = TokenSet.create(
        jnp.concatenate([x, query], axis=1), pos=jnp.concatenate([place, behind], axis=1),
        kind=jnp.broadcast_to(kind, (batch, *kind.shape)), of=(TEXT,), protected=self.queries,
        valid=jnp.pad(real, ((0, 0), (0, self.queries)), constant_values=True))
    read, _ = self.encoder(tokens)
    return TokenSet.create(dense(self.width, self.dtype, name='projection')(
        read.x[:, -self.queries:]))
