"""CoreMatching as released: what is no core token is blanked or hidden in the caches of layers.

Axes: B batch, N entries, F MLP width.
"""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from typing import Annotated

import jax.numpy as jnp

from ops.caches.blank import KVBlank
from ops.kv_cache import KVGather
from ops.primitives.kv_select import broadcast_to_heads, keep_best
from ops.primitives.queries import latest_but, shared_neurons
from ops.primitives.select import above_elbow
from ops.reducers.base import CacheReducer, Checked
from ops.signals import Signals
from ops.tokens import VISUAL, TokenSet
from ops.values import Count, OneOf

VARIANTS = ('release', 'hidden')


@dataclasses.dataclass(frozen=True)
class CoreMatchingCache(Checked, CacheReducer):
  """Keeps the entries of text, and of image tokens that share many MLP neurons with it.

  CoreMatching (Wang et al., 2025), arXiv:2505.19235, as released: each layer chooses by itself
  (`corematching` says how), the tokens themselves all stay, and so does the size of the caches. The
  release acts in layers 5 to 18 of 32; name them in a config.

  Attributes:
    variant: 'release', keys and values of other image tokens become zeros, which still take their
      part of every softmax; or 'hidden', they are not seen.
    back: whose neurons are shared, from the end of the prompt.
  """

  variant: Annotated[str, OneOf(VARIANTS)] = 'release'
  back: Count = 5
  needs = frozenset({'keys', 'mlp_hidden'})
  adaptive = 'the elbow decides how many image tokens stay'
  allocates = True

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> KVGather | KVBlank:
    image = tokens.real & (tokens.kind == VISUAL)
    active = signals.mlp_hidden > 0
    scores = shared_neurons(active, latest_but(tokens, self.back, active))
    stays = tokens.real & (~image | above_elbow(scores, image))
    if self.variant == 'release':
      return KVBlank(stays)
    wanted = broadcast_to_heads(jnp.where(stays, 0.0, -1.0), signals.keys.shape[2])
    return keep_best(tokens, wanted, num_slots=num_slots, order='slot').only(stays)

  def allocate(self, layer: int, depth: int, slots: int, asked: Fraction | None) -> int:
    """Returns the places of a layer, as `CacheReducer.allocate`: all."""
    del layer, depth
    if asked is not None:
      raise ValueError('corematching_cache keeps what the elbow says: leave keep_ratio, keep and '
                       'remove out')
    return slots
