"""TextMonkey's resampler: the tokens that its filter keeps attend to all tokens once more.

Axes: B batch, N slots now, M slots after, D features, C inner features, H heads, d features a head.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from ops.assignments import Assignment
from ops.attention import HIDDEN_LOGIT
from ops.moves.rows import take
from ops.primitives.farthest import largest_later_cosine
from ops.primitives.select import keep_top
from ops.reducers.base import Reducer
from ops.signals import Signals
from ops.tokens import TokenSet
from ops.values import Count, Width

Array = jax.Array


class TextMonkeyResampler(Reducer, nn.Module):
  """Keeps the tokens of `textmonkey` and adds learned attention over all tokens to them.

  The token resampler of TextMonkey (Liu et al., 2024), Sec. 3.2, arXiv:2403.04473, as released.
  Tokens are projected to C features; those that stay attend to all, and to themselves once more;
  an MLP that starts at zero makes of it what is added to their D features. Protected tokens pass
  as they are, and are not attended to.

  Attributes:
    width: C.
    heads: H.
    head_dim: d; the released model has C = H d = 1024 beside D = 4096.
  """

  width: Width = 1024
  heads: Count = 8
  head_dim: Width = 128
  site = 'after'
  drops = 'pruning drops tokens'

  @nn.compact
  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
    del signals
    answer = keep_top(tokens, -largest_later_cosine(tokens.x, tokens.free), num_slots=num_slots)
    down = _dense(self.width, 'downsample')(tokens.x)
    free, chosen = tokens.free, take(tokens.free, answer.src)
    if answer.valid is not None:
      chosen &= answer.valid
    seen = Attention(self.width, self.heads, self.head_dim, name='attention')(
        down, take(down, answer.src), free, chosen)
    change = nn.LayerNorm(epsilon=1e-5, dtype=jnp.float32, use_fast_variance=False,
                          name='norm')(seen)
    change = nn.gelu(_dense(self.width, 'fc1')(change), approximate=False)
    change = nn.Dense(tokens.x.shape[-1], use_bias=False, dtype=jnp.float32, name='fc2',
                      kernel_init=nn.initializers.zeros)(change)
    change *= self.param('scale', nn.initializers.ones, ())
    change = jnp.where(chosen[..., None], change, 0.0)
    return answer.replace(features=tokens.x + answer.restore(change).astype(tokens.x.dtype))


class Attention(nn.Module):
  """Latents attend to all tokens and to themselves, each normed on its own."""

  width: int
  heads: int
  head_dim: int

  @nn.compact
  def __call__(self, x: Array, latents: Array, free: Array, chosen: Array) -> Array:
    """Attends.

    Args:
      x: float32[B, N, C].
      latents: float32[B, M, C].
      free: bool[B, N], tokens that may be seen.
      chosen: bool[B, M], latents that may be.

    Returns:
      float32[B, M, C].
    """

    def norm(name: str, x: Array) -> Array:
      return nn.LayerNorm(epsilon=1e-5, dtype=jnp.float32, use_fast_variance=False, name=name)(x)

    x, latents = norm('norm_tokens', x), norm('norm_latents', latents)
    inner = self.heads * self.head_dim
    queries = _dense(inner, 'q')(latents)
    pairs = _dense(2 * inner, 'kv')(jnp.concatenate([x, latents], axis=1))
    q, k, v = (part.reshape(*part.shape[:2], self.heads, self.head_dim)
               for part in (queries, *jnp.split(pairs, 2, axis=2)))
    scores = jnp.einsum('bmhd,bnhd->bhmn', q, k) * self.head_dim ** -0.5
    seen = jnp.concatenate([free, chosen], axis=1)[:, None, None]
    weights = jax.nn.softmax(jnp.where(seen, scores, HIDDEN_LOGIT), axis=3)
    mixed = jnp.einsum('bhmn,bnhd->bmhd', weights, v)
    return _dense(self.width, 'out')(mixed.reshape(*mixed.shape[:2], inner))


def _dense(features: int, name: str) -> nn.Dense:
  return nn.Dense(features, use_bias=False, dtype=jnp.float32, name=name,
                  kernel_init=nn.initializers.lecun_normal())
