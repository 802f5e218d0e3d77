"""A method that watches."""

import dataclasses

import jax.numpy as jnp

from helpers.golden_vit import DEPTH
from ops.primitives.select import keep_top
from ops.reducers.base import Reducer


@dataclasses.dataclass(frozen=True)
class Watcher(Reducer):
  """Keeps the tokens with the largest sum of [CLS] attention over the layers watched.

  Attributes:
    first: the first layer watched.
  """

  first: int = 0
  drops = 'pruning drops tokens'
  watch_needs = frozenset({'cls_attention', 'layer'})

  def watched(self, cuts):
    return tuple(range(self.first, max(cuts, default=-1) + 1))

  def watch(self, tokens, signals):
    assert signals.keys is None
    assert signals.depth == DEPTH
    seen = jnp.where(tokens.real, signals.cls_attention.mean(axis=1), 0.0)
    count = jnp.full((*tokens.real.shape, 1), signals.layer, jnp.float32)
    past = tokens.stats.get('seen', jnp.zeros_like(seen))
    layers = tokens.stats.get('layers', jnp.zeros((*tokens.real.shape, 0)))
    return {'seen': past + seen, 'layers': jnp.concatenate([layers, count], axis=2)}

  def __call__(self, tokens, signals, *, num_slots):
    return keep_top(tokens, tokens.stats['seen'], num_slots=num_slots)
