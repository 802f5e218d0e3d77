"""Base classes of methods: a method is a frozen dataclass, or a Flax module, that inherits one.

Axes: B batch, N slots now, H heads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from fractions import Fraction
from typing import Annotated

import jax

from ops import tokens as tk
from ops.signals import Signals
from ops.tokens import TEXT, TokenSet, of_kept
from ops.values import OneOf, check_fields

Array = jax.Array
ATTENTIONS = ('cls_attention', 'received_attention')


class Checked:
  """Checks the fields of a method as it is made, as those of a config are (ops/values.py)."""

  def __post_init__(self) -> None:
    check_fields(self)


class Reducer:
  """Holds the defaults of a `Method` (ops/reducers/method.py), which documents the members.

  A method inherits this class and states only where it differs, by a class attribute, a dataclass
  field or a property. A method with parameters is a Flax module with this class beside it.

  Members that are properties here may depend on a method's settings.
  """

  kind: str = 'cut'
  site: str = 'between'
  parts: str = 'both'
  gated: str = 'both'
  tied: bool = False
  extra_slots: int = 0
  can_empty: bool = False
  reconstructed: str = ''

  @property
  def positions(self) -> str:
    return ''

  @property
  def proportional(self) -> bool:
    return False

  @property
  def mode(self) -> str:
    return ''

  @property
  def needs(self) -> frozenset[str]:
    return frozenset()

  @property
  def watch_needs(self) -> frozenset[str]:
    return frozenset()

  @property
  def reads(self) -> frozenset[str]:
    return frozenset()

  @property
  def drops(self) -> str:
    return ''

  @property
  def adaptive(self) -> str:
    return ''

  @property
  def span(self) -> int:
    return 0

  @property
  def hands_on(self) -> int:
    return 0

  @property
  def member_positions(self) -> int:
    return 0

  @property
  def merges(self) -> bool:
    """True if outputs combine several slots (Merge, Mix), False if each picks one (Gather).

    Decides the cost of a cut inside attention. Gather drops tokens; Merge and Mix usually do not.
    So the default is derived from `drops`. A method that merges and also drops tokens sets
    `merges = True`.
    """
    return not self.drops

  def watched(self, cuts: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the layers that it watches unless a config names some: none."""
    del cuts
    return ()

  def default_shares(self, depth: int) -> Mapping[int, float]:
    """Returns the share of tokens by layer for a config without a budget: none."""
    del depth
    return {}

  def pairs(self, slots: int, num_slots: int, protected: int) -> int:
    """Returns how many pairs of tokens attend in a branch of 'core': all of those that run."""
    del slots, protected
    return num_slots ** 2

  def decode_steps(self, layer: int, depth: int) -> int | None:
    """Returns how many decoded tokens run a branch: all."""
    del layer, depth
    return None

  def route(self, hidden: Array) -> tuple[Array, Array] | None:
    """Decides whether a decoded token runs a branch: it does."""
    del hidden
    return None

  def rows(self, tokens: TokenSet) -> Array:
    """Names the queries whose mean is row_attention, bool[B, N]: all text."""
    return tokens.real & (tokens.kind == TEXT)

  def max_rows(self, tokens: TokenSet) -> int:
    """Returns the most queries that `rows` can name: N."""
    return tokens.slots

  def expand(self, before: TokenSet, after: TokenSet, now: TokenSet) -> Array:
    """Returns the features of all tokens: each with the change that its slot has gone through."""
    del after
    return tk.expand(before, now)

  def min_slots(self, slots: int, protected: int) -> int:
    """Returns the fewest slots that it can leave: the protected ones, its own, and one more."""
    del slots
    return protected + self.extra_slots + 1


class BranchReducer(Reducer):
  """Lets some tokens run a part of a layer; what it adds to them is added to the residual stream.

  The call is that of any other method, and so is the answer, with the factors `gate` and
  `skip_scale` of a `Gather`; it is asked even where every token runs. On 'core' the answer is a
  `Pattern` (ops/primitives/sparse_attention.py).
  """

  site = 'branch'
  drops = 'other tokens skip the branch'


class CacheReducer(Reducer):
  """Prunes a layer's cache of keys and values once the prompt has been read.

  The call is that of any other method, with the tokens that the cache holds (of any kind; their
  features are not used) and the signals of the layer's attention over them. The answer is a
  `KVGather` (ops/kv_cache.py), which names entries for each kv head.

  One with an `evict` is an `EvictingMethod` (ops/reducers/method.py), of which this class has the
  defaults.
  """

  site = 'cache'
  drops = 'pruning drops tokens'

  @property
  def needs(self) -> frozenset[str]:
    return frozenset({'keys'})

  @property
  def every(self) -> int:
    return 1

  @property
  def shared(self) -> bool:
    return False

  @property
  def tracks(self) -> tuple[str, ...]:
    return ()

  @property
  def update_needs(self) -> frozenset[str]:
    return frozenset()

  @property
  def evict_needs(self) -> frozenset[str]:
    """Names what `evict` reads: what the prompt is cut by."""
    return self.needs

  @property
  def min_capacity(self) -> int:
    """Returns the fewest entries that it can keep while decoding: those that it leaves of many."""
    return self.min_slots(2 ** 31 - 1, 0)

  def update(self, tokens: TokenSet, signals: Signals, queries: Array) -> dict[str, Array]:
    """Leaves the stats as they are."""
    del signals, queries
    return tokens.stats

  def with_ratio(self, ratio: Fraction) -> CacheReducer:
    """Returns the method for a budget that is this share of entries: itself, or one that reads it.

    A count tells a method less, where it rounds shares of its own.
    """
    del ratio
    return self

  def read_slots(self, slots: int) -> int:
    """Returns the entries of a head that a step of decoding reads, of so many: all."""
    return slots

  def stored_bytes(self, num_slots: int, heads: int, width: int,
                   itemsize: int) -> tuple[int, int] | None:
    """Returns the bytes of a row's entries in one layer, where they are stored in a way of its own.

    Args:
      num_slots: M, entries of a head, on average.
      heads: K.
      width: d.
      itemsize: bytes of a number in keys and values.

    Returns:
      Those of keys and values that stay, and all that is allocated for them, with positions and
      masks; None where M entries of each head are stored as ever.
    """
    del num_slots, heads, width, itemsize
    return None

  @property
  def allocates(self) -> bool:
    """Returns whether the method says itself how many entries a layer keeps (`allocate`)."""
    return False

  def allocate(self, layer: int, depth: int, slots: int, asked: Fraction | None) -> int:
    """Returns the entries of a layer, of a method that `allocates`.

    Args:
      layer, depth: which of how many.
      slots: entries that the layer has.
      asked: those that the config's budget asks for, not rounded; None where it has none.

    Raises:
      ValueError: no budget where there must be one, or one where there must be none.
    """
    raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class ByAttention(Checked, Reducer):
  """Ranks tokens by the attention that they receive.

  Attributes:
    by: the signal to rank by: 'cls_attention', the attention of the [CLS] token, or
      'received_attention', the mean over all tokens, for backbones without a [CLS] token.
  """

  by: Annotated[str, OneOf(ATTENTIONS)] = 'cls_attention'

  @property
  def needs(self) -> frozenset[str]:
    """Names the signal that `by` is."""
    return frozenset({self.by})

  def attention(self, signals: Signals) -> Array:
    """Returns the attention that each token receives, float32[B, H, N]."""
    return signals.cls_attention if self.by == 'cls_attention' else signals.received_attention


@dataclasses.dataclass(frozen=True)
class ByQuantiles(ByAttention):
  """Samples tokens at quantiles of the attention that they receive; repeats become padding.

  Attributes:
    points: sample points; None for as many as slots are to be filled. Where more tokens are sampled
      than fit, the least significant are dropped.
  """

  points: int | None = None
  site = 'inside'
  drops = 'pruning drops tokens'
  adaptive = 'a token that is sampled twice fills one slot'

  def __post_init__(self) -> None:
    super().__post_init__()
    if self.points is not None and self.points < 1:
      raise ValueError(f'points={self.points} must be at least 1, or None for as many as fit')

  @property
  def needs(self) -> frozenset[str]:
    return super().needs | {'values'}

  def num_points(self, tokens: TokenSet, num_slots: int) -> Array | int:
    """Returns the number of sample points in a cut that leaves `num_slots` slots.

    It is int32[B, 1] where rows have budgets.
    """
    if self.points is not None:
      return self.points
    return of_kept(tokens, num_slots, lambda kept: max(kept, 1))

  def most_points(self, tokens: TokenSet, num_slots: int) -> int:
    """Returns the most sample points that a row can have."""
    return max(num_slots - tokens.protected, 1) if self.points is None else self.points
