"""The block of a language model, and what its tokens are where some were merged before it.

Axes: B batch, N slots now, T original tokens, D width, H heads, K kv heads, d width of a head, S
slots of a cache, F MLP width, P numbers in a position.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from models import sharded_attention
from models.backbones.masks import EXCEPTIONS
from models.blocks import ReducibleBlock
from models.memory import COLLECTION, MLP, Product, changed
from ops import unmerge
from ops.kv_cache import KV, LayerCache
from ops.moves.rows import take
from ops.primitives import products
from ops.rope import Rope, sequence_index
from ops.signals import Signals, measure
from ops.tokens import TEXT, TokenSet, key_bias

Array = jax.Array


def rms_norm(eps: float) -> nn.RMSNorm:
  """Returns the norm of every block, in float32."""
  return nn.RMSNorm(epsilon=eps, dtype=jnp.float32)


def product(features: int | tuple[int, ...], dtype: DTypeLike, *, bias: bool = False,
            axis: int | tuple[int, ...] = -1) -> Product:
  """Returns a matrix product with the initialisation of the blocks."""
  return Product(features, axis=axis, dtype=dtype, use_bias=bias,
                 kernel_init=nn.initializers.normal(0.02),
                 dot_general=products.dot_general(dtype))


class Block(ReducibleBlock):
  """Pre-norm decoder block; norms, rotations and softmax in float32, products in `dtype`.

  Attributes:
    kv_heads: heads of keys and values, each shared by heads / kv_heads queries.
    head_width: d, features a head.
    rope: how positions become rotations; its width is d.
    window: number of positions up to its own that a token sees; 0 for all.
    qkv_bias: whether queries, keys and values have biases (Qwen 2).
    qk_norm: whether each head's queries and keys are normed before they are rotated (Qwen 3).
    slots: 'ordered' where they stand in the order of positions, so that kernels may mask by slot;
      'any' otherwise.
    mask, unmerging: see `LM` (models/backbones/lm.py).
  """

  width: int
  heads: int
  kv_heads: int
  head_width: int
  mlp: int
  rope: Rope
  window: int = 0
  qkv_bias: bool = False
  qk_norm: bool = False
  norm_eps: float = 1e-5
  dtype: DTypeLike = jnp.float32
  implementation: str = 'xla'
  mesh: Mesh | None = None
  slots: str = 'ordered'
  mask: str = 'causal'
  unmerging: str = 'none'

  def setup(self) -> None:
    """Makes two norms, attention's four products and the MLP's three."""
    super().setup()
    project = functools.partial(product, dtype=self.dtype)
    self.q = project((self.heads, self.head_width), bias=self.qkv_bias)
    self.k = project((self.kv_heads, self.head_width), bias=self.qkv_bias)
    self.v = project((self.kv_heads, self.head_width), bias=self.qkv_bias)
    if self.qk_norm:
      self.q_norm, self.k_norm = rms_norm(self.norm_eps), rms_norm(self.norm_eps)
    self.gate, self.up, self.down = project(self.mlp), project(self.mlp), project(self.width)

  def make_norm(self) -> nn.Module:
    """Makes the norm that stands before attention, and before the MLP."""
    return rms_norm(self.norm_eps)

  def make_out(self) -> nn.Module:
    """Makes the product of what attention reads."""
    return product(self.width, self.dtype, axis=(-2, -1))

  @property
  def is_causal(self) -> bool:
    """Returns whether a token sees only those before it."""
    return self.mask != 'full'

  def queries_and_keys(self, hidden: Array, tokens: TokenSet) -> tuple[Array, Array, Array]:
    """Returns rotated queries [B, N, H, d], keys [B, N, K, d], and queries before rotation."""
    return self._queries_and_keys(hidden, tokens.pos)

  def values(self, hidden: Array) -> Array:
    """Returns values float[B, N, K, d]."""
    return self.v(hidden)

  def order(self, tokens: TokenSet) -> dict[str, Any]:
    """Returns the positions by which attention is causal, the window, and what is seen beside."""
    if not self.is_causal:
      return {'positions': None}
    beside = EXCEPTIONS.get(self.mask)
    pairs = {'pairs': beside(tokens)} if beside else {}
    return pairs | {'positions': sequence_index(tokens.pos), 'window': self._window(tokens)}

  def kernel_order(self, tokens: TokenSet, bias: Array | None,
                   proportional: bool) -> tuple[Array | None, Array | None]:
    """Returns bias and positions that a fused kernel needs.

    Where it masks by slot and that hides all padding it needs neither: a bias would widen each
    head, at d = 128 beyond what some kernels take, and by a tile in others.
    """
    if not self.is_causal:
      return bias, None
    by_slot, counts = self.slots == 'ordered', proportional and tokens.size is not None
    hidden = by_slot and tokens.padding == 'last' and not counts
    return None if hidden else bias, None if by_slot else sequence_index(tokens.pos)

  def attend(self, tokens: TokenSet, *, needs: frozenset[str], proportional: bool,
             **query_rows: Any) -> tuple[Array, Signals]:
    """Returns the same as `ReducibleBlock.attend`; with virtual unmerging among original tokens.

    Signals are then those of the slots, as if each were a single token.
    """
    if self.mask == 'composite' and tokens.texts is not None:
      return self._attend_by_text(tokens, needs=needs, proportional=proportional, **query_rows)
    if self.unmerging == 'none':
      return super().attend(tokens, needs=needs, proportional=proportional, **query_rows)
    hidden = self.norm1(tokens.x)
    q, k, plain, v = self.project(hidden, tokens)
    signals = measure(needs, q=q, k=k, v=v, lse=None, hidden=hidden, query_valid=tokens.valid,
                      bias=key_bias(tokens, proportional=False), **self.order(tokens), **query_rows)
    # Where slots are masked by their order, original tokens are.
    mix = functools.partial(sharded_attention.attend, positions=None, causal=True, mesh=self.mesh,
                            window=self._window(tokens), implementation=self.implementation)
    mixed = unmerge.attend(q, k, v, _owner(tokens), functools.partial(_apart, self.rope, tokens),
                           mix=mix)
    change = self.residual(tokens.x, self.out(mixed), 0)
    more = {'plain_queries': plain, 'attention_out': change}
    return change, signals.replace(**{name: x for name, x in more.items() if name in needs})

  def _attend_by_text(self, tokens: TokenSet, *, needs: frozenset[str], proportional: bool,
                      **query_rows: Any) -> tuple[Array, Signals]:
    """Returns the same as `attend` where visual tokens see themselves alone.

    Queries are made of at most `tokens.texts` slots, and as many rows of the map. No kernel masks
    such a part of it, so XLA forms it.
    """
    hidden, order = self.norm1(tokens.x), self.order(tokens)
    q, k, plain, v = self.project(hidden, tokens)
    bias = key_bias(tokens, proportional=proportional)
    # Queries of all slots run only where a signal reads them.
    signals = measure(needs, q=q, k=k, v=v, lse=None, bias=bias, hidden=hidden,
                      query_valid=tokens.valid, **order, **query_rows)
    k, signals = jax.lax.optimization_barrier((k, signals))
    text = tokens.real & (tokens.kind == TEXT)
    rows = jnp.argsort(~text, axis=1, stable=True)[:, :tokens.texts]
    asking = self._queries_and_keys(take(hidden, rows), take(tokens.pos, rows))[0]
    mixed = sharded_attention.attend(
        asking, k, v, bias, order['positions'], mesh=self.mesh, implementation='xla', causal=True,
        last=take(order['positions'], rows), window=order['window'],
        pairs=order['pairs'].of(rows)).out
    own = jnp.repeat(v, self.heads // self.kv_heads, axis=2)
    mixed = jax.vmap(lambda own, row, new: own.at[row].set(new))(own, rows, mixed)
    change = self.residual(tokens.x, self.out(mixed), 0)
    more = {'plain_queries': plain, 'attention_out': change}
    return change, signals.replace(**{name: x for name, x in more.items() if name in needs})

  def residual(self, x: Array, made: Array, branch: int) -> Array:
    """Returns what attention or the MLP made, the latter with what a memory changes."""
    if branch and self.has_variable(COLLECTION, MLP):
      return changed(self, MLP, made, self.entering(x, 1))
    return made

  def inner(self, hidden: Array) -> Array:
    """Returns the MLP's inner activations, float[B, N, F]."""
    return nn.silu(self.gate(hidden)) * self.up(hidden)

  def outer(self, inner: Array) -> Array:
    """Returns the MLP's output, float[B, N, D]."""
    return self.down(inner)

  def step(self, carry: tuple[Array, Array, Array | None], kv: LayerCache, *,
           gates: tuple[Array | None, Array | None] = (None, None),
           between: Callable[[Array], Array] | None = None,
           ) -> tuple[tuple[Array, Array, Array | None], tuple[LayerCache, Signals]]:
    """Runs one token a row through the block, over its cache.

    Args:
      carry: float[B, D]; int32[], the number of the step; and bool[B], rows that have a token, or
        None for all.
      kv: the cache of this layer.
      gates: float[B] or None, what the changes of attention and of the MLP are multiplied with.
      between: what the features become between the two, or None.

    Returns:
      The carry, the cache, and the token's `queries` and `last_attention`.
    """
    x, step, valid = carry
    pos = kv.position(step) if self.rope.steps == 1 else self.rope.after(kv.start, step)
    index = pos if pos.ndim == 1 else pos[:, 0]
    hidden = self.norm1(x)
    q, k, _ = self._queries_and_keys(hidden, pos)
    kv = kv.append(k, self.v(hidden), index, step, valid)
    mixed, weights = kv.attend(q, index, self.window)
    x = x + _gated(self.out(mixed).astype(x.dtype), gates[0])
    x = between(x) if between else x
    change = self.residual(x, self.outer(self.inner(self.norm2(x))), 1).astype(x.dtype)
    signals = Signals(queries=q[:, None], last_attention=cast(Array, weights))
    return (x + _gated(change, gates[1]), step, valid), (kv, signals)

  def extend(self, carry: tuple[Array, TokenSet, Array], kv: LayerCache, *,
             needs: frozenset[str], span: int,
             between: Callable[[Array], Array] | None = None,
             ) -> tuple[tuple[Array, TokenSet, Array], tuple[LayerCache, Signals]]:
    """Runs a chunk of tokens through the block, over its cache and itself.

    Args:
      carry: float[B, C, D]; the chunk, positions counted from its start; and int32[], the number
        of tokens written before it.
      kv: the cache of this layer.
      needs: names of `Signals` fields, of S keys and the chunk's queries.
      span: as in `ops.signals.measure`.
      between: as of `step`.

    Returns:
      The carry, the cache, and the signals.
    """
    x, chunk, step = carry
    pos = (kv.start + step)[:, None] + chunk.pos
    index = sequence_index(pos)
    hidden = self.norm1(x)
    q, k, _ = self._queries_and_keys(hidden, pos)
    kv = kv.extend(k, self.v(hidden), index, chunk.real, step)
    signals = Signals()
    if isinstance(kv, KV):  # No other cache is of a prompt that goes on.
      signals = measure(needs, q=q, k=jnp.swapaxes(kv.k, 1, 2), v=jnp.swapaxes(kv.v, 1, 2),
                        lse=None, bias=kv.visible_bias, hidden=hidden, query_valid=chunk.valid,
                        positions=kv.pos, last=index, window=self.window or None, span=span)
    x = x + self.out(kv.attend_chunk(q, index, self.window)).astype(x.dtype)
    x = between(x) if between else x
    change = self.residual(x, self.outer(self.inner(self.norm2(x))), 1)
    return (x + change.astype(x.dtype), chunk, step), (kv, signals)

  def _queries_and_keys(self, hidden: Array, pos: Array) -> tuple[Array, Array, Array]:
    """Rotated queries [..., H, d], rotated keys [..., K, d], and queries before the rotation."""
    q, k = self.q(hidden), self.k(hidden)
    if self.qk_norm:
      q, k = self.q_norm(q).astype(self.dtype), self.k_norm(k).astype(self.dtype)
    return self.rope.rotate(q, pos), self.rope.rotate(k, pos), q

  def _window(self, tokens: TokenSet) -> int | None:
    """The window, None where all original tokens fit into it."""
    return self.window if 0 < self.window < tokens.owner.shape[1] else None


def _gated(change: Array, gate: Array | None) -> Array:
  """A change float[B, D] times float[B]."""
  return change if gate is None else change * gate[:, None].astype(change.dtype)


def _apart(rope: Rope, tokens: TokenSet, x: Array) -> Array:
  """Turns what slots have, [B, T, H, d] by original token, on to these tokens' own positions."""
  assert tokens.places is not None
  turn = dataclasses.replace(rope, temperature=1.0)  # They have their amplitude already.
  return turn.rotate(x, tokens.places - unmerge.expand(tokens.pos, tokens.owner))


def _owner(tokens: TokenSet) -> Array:
  """int32[B, T]: the slot of each original token, -1 for those that are gone and for padding."""
  real = unmerge.expand(tokens.real, tokens.owner)
  return jnp.where(real & (tokens.owner >= 0), tokens.owner, -1)


def unmerged(rope: Rope, tokens: TokenSet, signals: Signals) -> tuple[TokenSet, Signals]:
  """Returns the original tokens of slots as a cache holds them: keys, values and positions."""
  assert tokens.places is not None
  keys = _apart(rope, tokens, unmerge.expand(signals.keys, tokens.owner))
  values = unmerge.expand(signals.values, tokens.owner)
  owner = _owner(tokens)
  whole = TokenSet(values, tokens.places, jnp.zeros(owner.shape, jnp.int8), owner, valid=owner >= 0)
  return whole, Signals(keys=keys, values=values)
