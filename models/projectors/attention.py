"""Attention between two sets of features, as torch's MultiheadAttention, and without products.

Axes: B batch, ... others, M queries, R keys, D features, W features of values, H heads, d features
a head.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from models.blocks import Heads, check_heads, dense
from ops.attention import HIDDEN_LOGIT

Array = jax.Array


def attend(q: Array, k: Array, v: Array, seen: Array | None = None) -> Array:
  """Returns what queries read of keys in one head, without any product in front or behind.

  Args:
    q: float[..., M, D].
    k: float[..., R, D].
    v: float[..., R, W].
    seen: bool[..., R], keys that may be read; None for all. Where there is none the result is
      finite and means nothing.

  Returns:
    float[..., M, W].
  """
  scores = jnp.einsum('...md,...rd->...mr', q, k, preferred_element_type=jnp.float32)
  scores = scores * q.shape[-1] ** -0.5
  if seen is not None:
    scores = jnp.where(seen[..., None, :], scores, HIDDEN_LOGIT)
  weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
  return jnp.einsum('...mr,...rw->...mw', weights, v)


class CrossAttention(nn.Module):
  """Lets queries attend to keys, with products in front and behind, and no residual.

  Attributes:
    heads: H.
    dtype: of the products.
  """

  heads: int
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, q: Array, k: Array, v: Array, seen: Array | None = None) -> Array:
    """Attends.

    Args:
      q: float[B, ..., M, D]; of queries that all rows share B may be 1.
      k, v: float[B, ..., R, D]; of keys that all rows share B may be 1.
      seen: bool[B, ..., R], keys that may be read; None for all. Where there is none the result is
        finite and means nothing.

    Returns:
      float[B, ..., M, D].

    Raises:
      ValueError: heads that do not divide D.
    """
    width = q.shape[-1]
    check_heads(width, self.heads)
    project = Heads(self.heads, self.dtype, name='qkv')

    def heads(x: Array, part: int) -> Array:
      each, = project(x.reshape(-1, *x.shape[-2:]), first=part, last=part + 1)
      return each.reshape(*x.shape[:-1], *each.shape[2:])

    q, k, v = heads(q, 0), heads(k, 1), heads(v, 2)
    scores = jnp.einsum('...mhd,...rhd->...hmr', q, k,
                        preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    if seen is not None:
      scores = jnp.where(seen[..., None, None, :], scores, HIDDEN_LOGIT)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    mixed = jnp.einsum('...hmr,...rhd->...mhd', weights, v)
    out = dense(width, self.dtype, axis=(-2, -1), name='out')(
        mixed.reshape(-1, *mixed.shape[-3:]))
    return out.reshape(*mixed.shape[:-2], width)
