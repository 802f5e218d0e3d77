"""Text towers of CLIP and SigLIP, on the blocks and the stack of the vision transformer.

CLIP (Radford et al., 2021), Sec. 2.4, arXiv:2103.00020; SigLIP (Zhai et al., 2023),
arXiv:2303.15343.

Axes: B batch, T tokens of a text, N slots, D width.
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
from ops.moves.rows import take
from ops.tokens import SPECIAL, TEXT, TokenSet

Array = jax.Array

POOLS = ('eot', 'last')


class Text(nn.Module):
  """Token ids to one feature vector a text.

  Attributes:
    width, depth, mlp, heads: as in models/families.py.
    vocabulary: number of token ids. Its last one ends a text (CLIP's <|endoftext|>).
    context: T, tokens of every text; shorter ones are padded by the tokenizer.
    causal: whether a token sees only those before it.
    pool: what stands for the text: 'eot', its first end token, and what follows is padding; or
      'last', whatever stands last, and every token is real (SigLIP pads and attends to it).
    projection: features that the text ends with, 0 for the pooled D.
    projection_bias: whether that product has a bias.
    activation, norm_eps, dtype, implementation, plan, mesh, remat, capture: as in ViT.
  """

  width: values.Width
  depth: values.Depth
  mlp: values.Width
  heads: values.Count
  vocabulary: values.Count
  context: values.Count
  causal: bool
  pool: Annotated[str, values.OneOf(POOLS)]
  projection: values.WidthOrZero = 0
  projection_bias: bool = False
  activation: Annotated[str, values.OneOf(ACTIVATIONS)] = 'gelu'
  dropout: values.Rate = 0.0
  norm_eps: values.NotNegative = 1e-6
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

  @property
  def special(self) -> int:
    """Special tokens of a text: the one that is pooled, and CLIP's first."""
    return 1 + (self.pool == 'eot')

  @property
  def host(self) -> Host:
    """Describes this model to plans; it has no [CLS] token and no grid."""
    return Host(self.depth, self.context, self.special, OFFERS - {'grid'})

  @nn.compact
  def __call__(self, ids: Array) -> tuple[Array, Outputs]:
    """Encodes texts.

    Args:
      ids: int32[B, T], T = context, each below `vocabulary`; under pool='eot' with an end token.

    Returns:
      Features float32[B, projection or D], and a dict: 'tokens' (the final TokenSet, normed),
      'pooled' float32[B, D], with `capture` 'embedded' float[B, T, D], and what models/stack.py
      adds.

    Raises:
      ValueError: ids of another length or dtype, or unknown settings.
    """
    self._check(ids)
    index = self._pooled(ids)
    tokens = self._embed(ids, index)
    embedded = tokens.x
    block = Block(self.width, self.heads, self.mlp, self.dropout, self.norm_eps, self.dtype,
                  self.implementation, self.mesh, self.activation, causal=self.causal, parent=None)
    tokens, out = Stack(block, self.depth, self.plan, None, self.remat, self.mesh, self.capture,
                        causal=self.causal, name='stack')(tokens)
    tokens = tokens.replace(x=layer_norm(self.norm_eps, name='norm')(tokens.x))
    # Reductions move tokens: the pooled one is in the slot that now holds it.
    slot = jnp.take_along_axis(tokens.owner, index[:, None], axis=1)
    pooled = take(tokens.x, slot)[:, 0]
    out |= {'tokens': tokens, 'pooled': pooled}
    if self.capture:
      out['embedded'] = embedded
    if self.projection:
      pooled = nn.Dense(self.projection, use_bias=self.projection_bias, dtype=jnp.float32,
                        kernel_init=nn.initializers.lecun_normal(), name='projection')(pooled)
    return pooled, out

  def _check(self, ids: Array) -> None:
    if ids.ndim != 2 or ids.shape[1] != self.context or not jnp.issubdtype(ids.dtype, jnp.integer):
      raise ValueError(f'token ids of shape {ids.shape} and dtype {ids.dtype} do not fit: expected '
                       f'integers [batch, {self.context}]; shorten the text, or pad it '
                       '(lib/data/tokenizers.py)')

  def _pooled(self, ids: Array) -> Array:
    """int32[B]: which token stands for its text."""
    if self.pool == 'eot':
      return jnp.argmax(ids == self.vocabulary - 1, axis=1).astype(jnp.int32)
    return jnp.full(ids.shape[:1], self.context - 1, jnp.int32)

  def _embed(self, ids: Array, index: Array) -> TokenSet:
    normal = nn.initializers.normal(0.02)
    table = self.param('table', normal, (self.vocabulary, self.width))
    pos = self.param('pos', normal, (1, self.context, self.width))
    x = (jnp.asarray(table)[ids] + pos).astype(self.dtype)
    x = nn.Dropout(self.dropout)(x, deterministic=not self.has_rng('dropout'))
    iota = jnp.broadcast_to(jnp.arange(self.context, dtype=jnp.int32), ids.shape)
    special, valid = iota == index[:, None], None
    if self.pool == 'eot':
      special, valid = special | (iota == 0), iota <= index[:, None]
    kind = jnp.where(special, SPECIAL, TEXT).astype(jnp.int8)
    return TokenSet.create(x, pos=iota, kind=kind, valid=valid, of=(TEXT,), protected=self.special)
