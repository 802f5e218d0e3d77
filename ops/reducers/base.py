"""What every reduction declares: a frozen dataclass, or a Flax module, with these attributes.

Axes: B batch, N slots now, H heads.
"""

from __future__ import annotations

import dataclasses

import jax

from ops.signals import Signals
from ops.tokens import TEXT, TokenSet

Array = jax.Array
ATTENTIONS = ('cls_attention', 'received_attention')


class Reducer:
  """Defaults of a method; a method states only where it differs.

  A method is called as `method(tokens, signals, num_slots=M)` with M a static int, and answers an
  Assignment (ops/tokens.py). A method with parameters is a Flax module with this class beside it.

  A method that looks at other layers than the one it cuts in also has
  `watch(tokens, signals)`, which answers stats, {name: [B, N, ...]}. They join `tokens.stats`, and
  so travel with the tokens to the cut. A watched layer shows the tokens after its attention (inside
  attention: before it; where it reads the MLP: after that); in a layer that is both watched and
  cut, the watch comes first.

  Attributes:
    needs: names of `Signals` fields that it reads.
    watch_needs: those that its `watch` reads.
    site: where it acts unless a config says otherwise: 'before', 'inside', 'between' or 'after'.
    proportional: whether attention should count a slot as many times as it has tokens.
    extra_slots: slots it makes beside those it keeps (a fused token).
    drops: '' if every original token stays in some slot, else why not.
    adaptive: '' if every slot it leaves is filled, else what decides how many are.
    positions: in language models, which positions the tokens left have: 'keep', 'compact' or
      'restart' (models/plan.py); '' for the host's own choice.
    span: rows of window_attention that it needs.
  """

  needs: frozenset[str] = frozenset()
  watch_needs: frozenset[str] = frozenset()
  site: str = 'between'
  proportional: bool = False
  extra_slots: int = 0
  drops: str = ''
  adaptive: str = ''
  positions: str = ''
  span: int = 0

  @property
  def merges(self) -> bool:
    """Whether its outputs are made of several slots (Merge, Mix) rather than picked (Gather).

    Decides what a cut inside attention costs. Who only picks loses tokens, so the default follows
    from `drops`; a method that joins and yet loses some says `merges = True`.
    """
    return not self.drops

  def watched(self, cuts: tuple[int, ...]) -> tuple[int, ...]:
    """Layers that it watches unless a config says otherwise, given those that it cuts in."""
    del cuts
    return ()

  def rows(self, tokens: TokenSet) -> Array:
    """bool[B, N], the queries whose mean is row_attention: all text, unless a method says."""
    return tokens.real & (tokens.kind == TEXT)

  def max_rows(self, tokens: TokenSet) -> int:
    """How many of those there can be; the fewer, the less is computed."""
    return tokens.slots

  def min_slots(self, slots: int, protected: int) -> int:
    """Fewest slots it can leave of `slots`, the protected ones included."""
    del slots
    return protected + self.extra_slots + 1


class CacheReducer(Reducer):
  """A method that thins out a layer's cache of keys and values once the prompt has been read.

  It is called as any other method, with the tokens that the cache holds (whatever their kind; their
  features unused) and the signals of the layer's attention over them. It answers a `KVGather`
  (ops/kv_cache.py), which names entries a kv head.
  """

  needs = frozenset({'keys'})
  site = 'cache'
  drops = 'pruning drops tokens'


@dataclasses.dataclass(frozen=True)
class ByAttention(Reducer):
  """A method that ranks tokens by how much they are attended to.

  Attributes:
    by: the attention: 'cls_attention', that of the [CLS] token, or 'received_attention', the mean
      over all tokens, for backbones without one.
  """

  by: str = 'cls_attention'

  def __post_init__(self) -> None:
    if self.by not in ATTENTIONS:
      raise ValueError(f'by={self.by!r} is unknown: choose one of {", ".join(ATTENTIONS)}')

  @property
  def needs(self) -> frozenset[str]:
    """The attention that `by` names."""
    return frozenset({self.by})

  def attention(self, signals: Signals) -> Array:
    """float32[B, H, N], the attention that each token gets."""
    return getattr(signals, self.by)
