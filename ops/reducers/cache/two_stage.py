"""Two stages: one method names candidates, another chooses among them.

Axes: B batch, N entries now, M entries after, K kv heads.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from ops.kv_cache import KVGather
from ops.primitives.kv_select import best_of_each_head, budgets, keep_best
from ops.reducers.scoring import ScoringReducer, Wrapper
from ops.signals import Signals
from ops.tokens import TokenSet

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class TwoStage(Wrapper, ScoringReducer):
  """Keeps the best entries by one method, of those that another would keep with a larger budget.

  A coarse cut and a fine one, as RocketKV (Behnam et al., 2025), arXiv:2502.14051, has them, or the
  kvpress library's ComposedPress. There the second method measures what the first has left; here
  both measure the whole prompt, which is read but once.

  Attributes:
    inner: the method that names candidates.
    then: the method that chooses, in a config a dict like `inner`.
    factor: candidates an entry that stays.
  """

  then: ScoringReducer
  factor: float = 2.0
  default: ClassVar[dict[str, str]] = {'inner': 'snapkv', 'then': 'keydiff'}

  def __post_init__(self) -> None:
    super().__post_init__()
    if self.factor < 1:
      raise ValueError(f'factor={self.factor} must be at least 1: the second stage chooses among '
                       'as many candidates an entry')

  def ranking(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Array:
    """Returns the second method's scores, float32[B, K, N], of candidates alone."""
    coarse = self.inner.ranking(tokens, signals, num_slots=num_slots)
    counts = jnp.floor(budgets(tokens, num_slots) * self.factor).astype(jnp.int32)
    candidates = best_of_each_head(coarse, counts)
    fine = self.then.ranking(tokens, signals, num_slots=num_slots)
    return jnp.where(candidates, fine, jnp.where(tokens.real[:, None],
                                                 jnp.finfo(jnp.float32).min / 8, -jnp.inf))

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> KVGather:
    return keep_best(tokens, self.ranking(tokens, signals, num_slots=num_slots),
                     num_slots=num_slots)
