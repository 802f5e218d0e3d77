"""Base classes of methods on the cache that rank entries, and of those that hold another method.

A method that ranks entries inherits `ScoringReducer` and states `scores`; any wrapper can then hold
it. A wrapper inherits `Wrapper`: what a held method reads, the wrapper reads too.

Axes: B batch, N entries now, M entries after, K kv heads.
"""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from typing import ClassVar, Self

import jax
import jax.numpy as jnp

from ops.kv_cache import KVGather
from ops.moves.rows import take
from ops.primitives.kv_select import in_order, keep_best, stays
from ops.reducers.base import CacheReducer
from ops.signals import Signals
from ops.tokens import TokenSet

Array = jax.Array


class ScoringReducer(CacheReducer):
  """Keeps the entries with the highest scores, head by head; so, too, while a model decodes.

  Attributes:
    by_order: whether scores, or the entries that are forced to stay, go by the order of slots.
  """

  by_order: bool = True

  def scores(self, tokens: TokenSet, signals: Signals) -> Array:
    """Returns float32[B, K, N]: the higher an entry's, the sooner it stays."""
    raise NotImplementedError

  def forced(self, tokens: TokenSet, num_slots: int) -> Array | None:
    """Names entries that stay whatever their score, bool[B, N]; None for none."""
    del tokens, num_slots
    return None

  def ranking(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Array:
    """Returns the scores as wrappers rank by them, float32[B, K, N].

    Entries that stay whatever their score have one more than the highest of their row; padding has
    -inf.
    """
    scores, forced = self.scores(tokens, signals), self.forced(tokens, num_slots)
    scores = jnp.where(tokens.real[:, None], scores, -jnp.inf)
    if forced is None:
      return scores
    best = jnp.max(jnp.where(forced[:, None], -jnp.inf, scores), axis=(1, 2), keepdims=True)
    best = jnp.where(jnp.isfinite(best), best, 0.0)
    return jnp.where(forced[:, None], best + 1, scores)

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> KVGather:
    return keep_best(tokens, self.scores(tokens, signals), num_slots=num_slots,
                     forced=self.forced(tokens, num_slots))

  def evict(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Array:
    """Lets the entries with the lowest scores go, as `EvictingMethod` has it."""
    scores, forced = self.scores_while_decoding(tokens, signals, num_slots=num_slots)
    return stays(tokens, scores, num_slots, forced)

  def scores_while_decoding(self, tokens: TokenSet, signals: Signals, *,
                            num_slots: int) -> tuple[Array, Array]:
    """Returns scores float32[R, S], and bool[R, S], the entries that stay whatever theirs."""
    back = None
    if self.by_order:
      tokens, signals, back = in_order(tokens, signals)
    scores = self.ranking(tokens, signals, num_slots=num_slots)[:, 0]
    forced = self.forced(tokens, num_slots)
    forced = jnp.zeros(tokens.pos.shape, bool) if forced is None else forced
    return (scores, forced) if back is None else (take(scores, back), take(forced, back))


@dataclasses.dataclass(frozen=True)
class Wrapper(CacheReducer):
  """Holds a method that ranks entries, and does something else with its ranking.

  Attributes:
    inner: the method; in a config a dict of its `method` and `args`.
  """

  inner: ScoringReducer
  # Signals that the wrapper reads itself.
  reads: ClassVar[frozenset[str]] = frozenset()
  # Names of the methods that fields hold where a config sets none; '' for no method.
  default: ClassVar[dict[str, str]]

  def __post_init__(self) -> None:
    for field, name in self.default.items():
      held = getattr(self, field)
      if not isinstance(held, ScoringReducer) and (name or held is not None):
        raise ValueError(f'{type(self).__name__} cannot hold {type(held).__name__} as its {field}, '
                         'which gives entries no scores: hold a method that ranks entries')

  @property
  def held(self) -> tuple[ScoringReducer, ...]:
    """Returns the methods that it holds."""
    return tuple(method for field in self.default if (method := getattr(self, field)) is not None)

  def with_ratio(self, ratio: Fraction) -> Self:
    """Tells the methods that it holds, as `CacheReducer.with_ratio`."""
    return dataclasses.replace(self, **{
        field: method.with_ratio(ratio) for field in self.default
        if (method := getattr(self, field)) is not None})

  @property
  def needs(self) -> frozenset[str]:
    return self.reads.union({'keys'}, *(method.needs for method in self.held))

  @property
  def span(self) -> int:
    return max((method.span for method in self.held), default=0)

  @property
  def positions(self) -> str:
    return next((method.positions for method in self.held if method.positions), '')

  def min_slots(self, slots: int, protected: int) -> int:
    return max((method.min_slots(slots, protected) for method in self.held), default=1)


class EvictingWrapper(Wrapper):
  """Holds a method that goes on letting entries go while a model decodes (`EvictingMethod`)."""

  inner: ScoringReducer

  @property
  def shared(self) -> bool:
    return self.inner.shared

  @property
  def evict_needs(self) -> frozenset[str]:
    return self.inner.evict_needs

  @property
  def update_needs(self) -> frozenset[str]:
    return self.inner.update_needs

  @property
  def tracks(self) -> tuple[str, ...]:
    return self.inner.tracks

  @property
  def min_capacity(self) -> int:
    return self.inner.min_capacity

  def update(self, tokens: TokenSet, signals: Signals, queries: Array) -> dict[str, Array]:
    """Takes down what the inner method takes down."""
    return self.inner.update(tokens, signals, queries)

  def evict(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Array:
    """Lets the entries go that the inner method lets go."""
    return self.inner.evict(tokens, signals, num_slots=num_slots)
