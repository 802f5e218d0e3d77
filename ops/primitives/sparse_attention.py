"""Attention between queries, keys and values that all tokens made, but not among all of them.

Axes: B batch, N slots, M slots that take part, G groups of heads, H heads, K kv heads, d features a
head; I images, V patches of all of them, R other slots, W side of a neighbourhood.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import struct

from ops import attention
from ops.assignments import Gather
from ops.attention import HIDDEN_LOGIT, Attended
from ops.kernels.fused import LOWEST_BIAS
from ops.moves.rows import take

Array = jax.Array
# (queries, keys, values, bias of keys, positions) -> what the host's own attention makes of them.
Attend = Callable[[Array, Array, Array, Array | None, Array | None], Attended]


class Pattern(Protocol):
  """Says who attends to whom in one layer: the answer of a method on a branch of 'core'.

  A class that inherits it has `wanted` None, and values as they are, unless it says otherwise.
  """

  @property
  def wanted(self) -> Array | None:
    """int32[B], the tokens that an adaptive method would have picked, had it had room."""
    return None

  def values(self, v: Array, heads: int) -> Array:
    """Returns values float[B, N, K, d] of H `heads` as they are attended to, and cached."""
    del heads
    return v

  def attend(self, attend: Attend, q: Array, k: Array, v: Array, bias: Array | None,
             positions: Array | None, *, causal: bool, window: int | None = None) -> Array:
    """Returns what all tokens read, float[B, N, H, d], zero where one takes no part.

    Args:
      attend: attention as the host runs it.
      q: float[B, N, H, d].
      k, v: float[B, N, K, d], `v` as `values` returned them.
      bias, positions: as the host would give them to `attend` for all tokens.
      causal: whether a token sees only those before it, by slot where there are no positions.
      window: of causal attention, which `attend` has by itself, or None.
    """
    ...


class HeadGather(Pattern, struct.PyTreeNode):
  """Lets some tokens attend to each other, in each group of heads others.

  Attributes:
    src: int32[B, G, M], the slots that take part, in order; G is 1 or H.
    valid: bool[B, G, M] or None, False where a place stays empty; such places come last.
    wanted: as in `Pattern`.
  """

  src: Array
  valid: Array | None = None
  wanted: Array | None = None

  def attend(self, attend: Attend, q: Array, k: Array, v: Array, bias: Array | None,
             positions: Array | None, *, causal: bool, window: int | None = None) -> Array:
    """Attends among the tokens of each group, as `Pattern.attend`."""
    del causal, window
    batch, groups, picked = self.src.shape
    slots, heads = q.shape[1:3]
    valid = None if self.valid is None else self.valid.reshape(-1, picked)
    gather = Gather(self.src.reshape(-1, picked), slots, valid=valid)

    def divide(x: Array) -> Array:
      """[B, N, H, d] -> [B * G, M, H / G, d]."""
      x = jnp.repeat(x, max(1, groups // x.shape[2]), axis=2)
      x = jnp.swapaxes(x.reshape(batch, slots, groups, -1, x.shape[-1]), 1, 2)
      return gather.apply(x.reshape(-1, slots, *x.shape[3:]))

    def spread(x: Array) -> Array:
      """[B, N] -> [B * G, M]."""
      return gather.apply(jnp.repeat(x, groups, axis=0))

    bias = None if bias is None else spread(bias)
    if valid is not None:
      bias = jnp.where(valid, 0.0 if bias is None else bias, HIDDEN_LOGIT)
    read = attend(divide(q), divide(k), divide(v), bias,
                  None if positions is None else spread(positions)).out
    read = gather.restore(read).reshape(batch, groups, slots, -1, q.shape[3])
    return jnp.swapaxes(read, 1, 2).reshape(batch, slots, heads, -1)


class Neighbourhood(Pattern, struct.PyTreeNode):
  """Lets every patch of an image see its neighbours, and what stands before the images.

  All other tokens see what they saw. No buffer has N x N entries: the map of the other tokens is
  R x N, that of a patch has its neighbours' rows of the image, and the other tokens.

  Attributes:
    patches: int32[B, V], slots of patches in raster order, image by image.
    others: int32[B, R], all other slots.
    valid: bool[B, V], False for padding, behind the patches of a row.
    grid: (rows, columns) of patches of an image; V is a multiple of their product. Static.
    window: W, an odd number. Static.
    heads: heads in which no patch reads anything, nor is read. Static.
    blind: more heads in which no patch is read, None for all. Static.
  """

  patches: Array
  others: Array
  valid: Array
  grid: tuple[int, int] = struct.field(pytree_node=False)
  window: int = struct.field(pytree_node=False)
  heads: tuple[int, ...] = struct.field(pytree_node=False, default=())
  blind: tuple[int, ...] | None = struct.field(pytree_node=False, default=())

  def values(self, v: Array, heads: int) -> Array:
    """Returns the values, zero for patches in heads in which none is read.

    Raises:
      ValueError: a head that shares its values with others, which read them.
    """
    blind = range(heads) if self.blind is None else {*self.heads, *self.blind}
    shared = heads // v.shape[2]
    counts = [sum(head * shared + i in blind for i in range(shared)) for head in range(v.shape[2])]
    if any(0 < count < shared for count in counts):
      raise ValueError(f'of heads {sorted(blind)} some share keys and values with others, {shared} '
                       'to each: name all heads of a group, or none')
    if not any(counts):
      return v
    patch = Gather(self.patches, v.shape[1], valid=self.valid).dst < self.patches.shape[1]
    silent = jnp.array([count > 0 for count in counts])
    return jnp.where(patch[:, :, None, None] & silent[None, None, :, None], 0, v)

  def attend(self, attend: Attend, q: Array, k: Array, v: Array, bias: Array | None,
             positions: Array | None, *, causal: bool, window: int | None = None) -> Array:
    """Attends as `Pattern.attend`; the host's own attention would see everything.

    Raises:
      ValueError: a window of causal attention.
    """
    del attend
    if window is not None:
      raise ValueError(f'neighbours of patches do not go with a window of {window} positions: '
                       'leave the method out, or give prompts that fit into the window')
    batch, slots, heads, _ = q.shape
    if positions is None:
      positions = jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32), (batch, slots))
    bias = jnp.zeros(positions.shape) if bias is None else jnp.maximum(bias, LOWEST_BIAS)
    k, v = (jnp.repeat(x, heads // x.shape[2], axis=2) for x in (k, v))
    shares = attention.rows(take(q, self.others), k, None, bias=bias, positions=positions,
                            last=take(positions, self.others) if causal else None)
    read = jnp.einsum('bhrn,bnhd->brhd', shares.astype(v.dtype), v)
    ahead = take(positions, self.others)[:, None] > take(positions, self.patches)[:, :, None]
    hidden = jnp.where(ahead & causal, HIDDEN_LOGIT, take(bias, self.others)[:, None])
    patches = self._read_by_patches(q, k, v, bias, hidden)
    return (Gather(self.others, slots).restore(read)
            + Gather(self.patches, slots, valid=self.valid).restore(patches))

  def _read_by_patches(self, q: Array, k: Array, v: Array, bias: Array, hidden: Array) -> Array:
    """Returns what patches read, float[B, V, H, d], with a bias on their logits of other tokens.

    In products i is an image, x a row of it, y and z columns, w a row of the neighbourhood.
    """
    batch, _, heads, width = q.shape
    count = self.others.shape[1]
    precision = 'highest' if q.dtype == jnp.float32 else 'default'
    product = functools.partial(jnp.einsum, precision=precision,
                                preferred_element_type=jnp.float32)
    own, scale = take(q, self.patches), width ** -0.5
    beside = product('bvhd,brhd->bhvr', own, take(k, self.others)) * scale + hidden[:, None]
    images = own.reshape(batch, -1, *self.grid, heads, width)
    near = product('bixyhd,bixwzhd->bhixywz', images, self._near(take(k, self.patches))) * scale
    column = jnp.arange(self.grid[1])
    close = jnp.abs(column[:, None] - column[None]) <= self.window // 2
    seen = self._near(self.valid)[:, None, :, :, None] & close[None, None, None, None, :, None]
    weight = self._near(take(bias, self.patches))[:, None, :, :, None]
    near = jnp.where(seen, near + weight, HIDDEN_LOGIT).reshape(batch, heads, own.shape[1], -1)
    shares = jax.nn.softmax(jnp.concatenate([beside, near], axis=3), axis=3).astype(v.dtype)
    read = jnp.einsum('bhvr,brhd->bvhd', shares[..., :count], take(v, self.others))
    near = shares[..., count:].reshape(batch, heads, -1, *self.grid, self.window, self.grid[1])
    read += jnp.einsum('bhixywz,bixwzhd->bixyhd', near,
                       self._near(take(v, self.patches))).reshape(read.shape)
    silent = jnp.isin(jnp.arange(heads), jnp.array(self.heads, int))
    return jnp.where(silent[None, None, :, None], 0, read)

  def _near(self, x: Array) -> Array:
    """Rows of the image around each patch's own: [B, V, ...] -> [B, I, rows, W, columns, ...]."""
    images = x.reshape(x.shape[0], -1, *self.grid, *x.shape[2:])
    half = self.window // 2
    padded = jnp.pad(images, [(0, 0), (0, 0), (half, half)] + [(0, 0)] * (images.ndim - 3))
    return jnp.stack([padded[:, :, w:w + self.grid[0]] for w in range(self.window)], axis=3)
