"""Defines the protocol of a method: its attributes and calls.

Axes: B batch, N slots now, M slots after.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import jax

from ops.assignments import Assignment
from ops.signals import Signals
from ops.tokens import TokenSet

Array = jax.Array


class Method(Protocol):
  """Decides which tokens stay, and as what. `Reducer` (ops/reducers/base.py) has the defaults.

  A method with a non-empty `watch_needs` is a `WatchingMethod`.
  """

  @property
  def needs(self) -> frozenset[str]:
    """Names of the `Signals` fields that it reads."""
    ...

  @property
  def watch_needs(self) -> frozenset[str]:
    """Names of the `Signals` fields that its `watch` reads."""
    ...

  @property
  def reads(self) -> frozenset[str]:
    """Names of stats of a prompt's tokens that it goes by, which a host or the caller makes."""
    ...

  @property
  def kind(self) -> str:
    """The kind of its events: 'cut', or 'insert' where tokens that have waited join."""
    ...

  @property
  def site(self) -> str:
    """Its place in a layer, unless a config sets one: 'before', 'inside', 'between' or 'after'.

    'branch' has no token leave: a part of the layer runs on fewer of them. Methods on the cache of
    keys and values have 'cache'.
    """
    ...

  @property
  def parts(self) -> str:
    """The part of a layer that a branch is, unless a config says.

    One of `models.plans.events.PARTS`.
    """
    ...

  @property
  def gated(self) -> str:
    """The part of a branch whose change its `gate` multiplies: 'both' or 'mlp'."""
    ...

  @property
  def tied(self) -> bool:
    """True if a learned method has the same parameters in all layers."""
    ...

  @property
  def proportional(self) -> bool:
    """True if attention weights each slot by the tokens that it stands for."""
    ...

  @property
  def extra_slots(self) -> int:
    """Number of slots that it makes beside those it keeps (a fused token)."""
    ...

  @property
  def can_empty(self) -> bool:
    """True if it may leave none of the tokens that it may touch, where a budget says 0."""
    ...

  @property
  def reconstructed(self) -> str:
    """Says from what a method is made of whose authors no code is known; '' where there is some."""
    ...

  @property
  def mode(self) -> str:
    """The mode that it needs, 'gather' or 'mask' (models/plans/); '' for either."""
    ...

  @property
  def drops(self) -> str:
    """Reason why original tokens are lost; '' if each of them stays in some slot."""
    ...

  @property
  def merges(self) -> bool:
    """True if outputs combine several slots (Merge, Mix), False if each picks one (Gather)."""
    ...

  @property
  def adaptive(self) -> str:
    """Reason why it may fill fewer slots than it leaves; '' if it fills all."""
    ...

  @property
  def positions(self) -> str:
    """Positions of the tokens left in a language model: 'keep', 'anchor', 'compact' or
    'restart'.

    models/plans/events.py explains them; '' leaves the choice to the host.
    """
    ...

  @property
  def span(self) -> int:
    """W, the rows of window_attention that it needs."""
    ...

  @property
  def hands_on(self) -> int:
    """Special tokens of a tower, the first ones, that it hands on, among those it keeps.

    A host of both sides reads it: behind a projector they join the visual tokens.
    """
    ...

  @property
  def member_positions(self) -> int:
    """K, how many members' positions a token that it merges carries, 0 for its anchor's alone.

    A host of both sides reads it: in a language model with M-RoPE every section then turns in K
    parts (`ops.rope.member_positions`).
    """
    ...

  def rows(self, tokens: TokenSet) -> Array:
    """Names the queries whose mean is row_attention, bool[B, N]."""
    ...

  def max_rows(self, tokens: TokenSet) -> int:
    """Returns the most queries that `rows` can name; the fewer, the less is computed."""
    ...

  def min_slots(self, slots: int, protected: int) -> int:
    """Returns the fewest slots that it can leave of `slots`, the protected ones included."""
    ...

  def expand(self, before: TokenSet, after: TokenSet, now: TokenSet) -> Array:
    """Reconstructs the features of tokens that it has reduced, some layers later.

    Args:
      before: N slots, as they entered its first cut.
      after: M slots, as they left it.
      now: K slots of today, fewer where there were more cuts.

    Returns:
      float[B, N, D].
    """
    ...

  def default_shares(self, depth: int) -> Mapping[int, float]:
    """Returns the share of tokens that each layer keeps where a config has no budget; {} for none.

    They are rounded down. A config that names no layers gets these; a layer without a share keeps
    all.
    """
    ...

  def pairs(self, slots: int, num_slots: int, protected: int) -> int:
    """Returns how many pairs of query and key there are in a head, in a branch of 'core'."""
    ...

  def decode_steps(self, layer: int, depth: int) -> int | None:
    """Returns how many of the tokens decoded after a prompt run a branch in a layer; None for all.

    Those are the first ones, of all rows alike.
    """
    ...

  def route(self, hidden: Array) -> tuple[Array, Array] | None:
    """Decides whether a decoded token runs a branch, row by row; None where all do.

    Args:
      hidden: float[B, D], the normed input of the layer.

    Returns:
      bool[B], whether it runs; then its keys are cached. float[B], the gate of its change.
    """
    ...

  def watched(self, cuts: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the layers that it watches, given those it cuts in, unless a config names some."""
    ...

  def __call__(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Assignment:
    """Reduces N slots to M = `num_slots`, a static number, protected slots included.

    Args:
      tokens: N slots.
      signals: the signals that `needs` names, measured in the layer at hand.
      num_slots: M, at least `min_slots` and less than N.
    """
    ...


class WatchingMethod(Method, Protocol):
  """Also looks at other layers than the one it cuts in."""

  def watch(self, tokens: TokenSet, signals: Signals) -> dict[str, Array]:
    """Returns stats, {name: [B, N, ...]}, that join `tokens.stats` and travel with the tokens.

    A watched layer shows the tokens after its attention (inside attention: before it; where the
    method reads the MLP: after that). In a layer that is both watched and cut, the watch comes
    first.

    Args:
      tokens: N slots.
      signals: the signals that `watch_needs` names, measured in the watched layer.
    """
    ...


class EvictingMethod(Method, Protocol):
  """Also keeps a cache within bounds while a model decodes.

  `update` and `evict` see the entries of a cache as tokens and signals of R rows, each one kv head
  of a row of the batch with the G heads that share it: `tokens.pos`, `valid` and `stats` [R, S],
  keys [R, S, 1, d], attention [R, G, S]. Slots are in no order. Where `shared` all heads hold the
  same entries, R is B, and the signals are of all heads.
  """

  @property
  def every(self) -> int:
    """Number of tokens between two calls of `evict`; so many come on top of the capacity."""
    ...

  @property
  def shared(self) -> bool:
    """True if all heads keep the same entries."""
    ...

  @property
  def min_capacity(self) -> int:
    """Returns the fewest entries of a head that it can keep."""
    ...

  @property
  def tracks(self) -> tuple[str, ...]:
    """Names of the stats that it takes down of every entry."""
    ...

  @property
  def update_needs(self) -> frozenset[str]:
    """Names of the `Signals` fields that `update` reads, of prompts and of decoded tokens."""
    ...

  @property
  def evict_needs(self) -> frozenset[str]:
    """Names of the `Signals` fields that `evict` reads."""
    ...

  def update(self, tokens: TokenSet, signals: Signals, queries: Array) -> dict[str, Array]:
    """Returns the stats, {name: float32[R, S]}, after more tokens; of new entries they are 0.

    It is called once for the prompt before that is cut, and once a decoded token.

    Args:
      tokens: S entries, those of the new tokens among them.
      signals: of the new tokens' attention.
      queries: int32[R], the number of new tokens.
    """
    ...

  def evict(self, tokens: TokenSet, signals: Signals, *, num_slots: int) -> Array:
    """Names the entries that stay, bool[R, S], at most `num_slots` of a row.

    Args:
      tokens: S entries, those since the last call among them.
      signals: of the latest token's attention.
      num_slots: static; the slots are `every` more.
    """
    ...


class MergingMethod(EvictingMethod, Protocol):
  """Also has the value of an entry that leaves live on in others; one leaves at a time.

  All values of a layer are written anew for every token.
  """

  def absorb(self, tokens: TokenSet, signals: Signals, stays: Array) -> Array:
    """Divides the value of the entry that leaves: the part that each other gets, float32[R, S].

    Args:
      tokens, signals: as `evict` is given them.
      stays: bool[R, S], its answer, without at most one entry of a row.
    """
    ...
