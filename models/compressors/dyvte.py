"""DyVTE: a gate tells in which layer of a language model no visual token is needed any more.

Axes: B batch, N slots now, D features.
"""

import flax.linen as nn
import jax.numpy as jnp

from ops.assignments import Assignment
from ops.moves.rows import take
from ops.primitives.kv_select import latest
from ops.primitives.queries import text_after_images
from ops.reducers.base import Reducer
from ops.signals import Signals
from ops.tokens import TokenSet, identity
from ops.values import Width


class DyVTE(Reducer, nn.Module):
  """Lets all tokens leave a row in the first layer whose gate says so.

  DyVTE (Wu et al., 2024), arXiv:2411.19628, as released: behind each layer a gate of two products
  reads the mean of the text behind the image without its last token, and that last token. Here
  every row of a batch decides for itself (the release takes the first row's decision for all). The
  layer is known only once it has run, so slots stay as padding (mode='mask'): exact, and as costly
  as without. To save, let everything leave at a fixed layer: any method that prunes, with keep=0.
  How the gate learns (whether the answers would stay the same) is not here.

  Attributes:
    width: of the gate's hidden features.
  """

  width: Width = 2048
  # Where there is none there is no text that gates could read.
  needs = frozenset({'rope'})
  site = 'after'
  mode = 'mask'
  positions = 'keep'
  drops = 'pruning drops tokens'
  adaptive = 'a row whose gate stays shut keeps all its tokens'
  can_empty = True

  @nn.compact
  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
    del signals, num_slots
    x = tokens.x.astype(jnp.float32)
    text = text_after_images(tokens)
    last = latest(tokens.replace(valid=text), 1)
    rest = (text & ~last).astype(jnp.float32)[..., None]
    mean = jnp.sum(x * rest, axis=1) / jnp.maximum(jnp.sum(rest, axis=1), 1.0)
    own = take(x, jnp.argmax(last, axis=1)[:, None])[:, 0]

    def product(features: int, name: str) -> nn.Dense:
      return nn.Dense(features, use_bias=False, dtype=jnp.float32, name=name,
                      kernel_init=nn.initializers.normal(0.02))

    hidden = nn.gelu(product(self.width, 'fc1')(jnp.concatenate([mean, own], axis=1)),
                     approximate=False)
    stay, leave = jnp.split(product(2, 'fc2')(hidden), 2, axis=1)
    return identity(tokens).replace(valid=tokens.real & (tokens.fixed | (leave <= stay)))
