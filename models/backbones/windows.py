"""Windows: attention and reductions that stay in equal rectangles of the patch grid.

As in ViTDet (Li et al., 2022), Sec. 3, arXiv:2203.16527, and SAM (Kirillov et al., 2023), App. A,
arXiv:2304.02643: most layers attend within windows, a few see the whole image.

Axes: B batch, W windows of an image, N slots of an image, n slots of a window, S special tokens,
T original tokens, H heads, D features.

Between layers the windows lie on the batch axis: [B, N, D] is [B * W, n, D], n = S + (N - S) / W.
A method treats every row by itself, so any method reduces every window by itself, to equally many
slots. Special tokens join every window; where the windows come together, their copies are averaged.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.reduction import Event, Reduction
from models.stack import Outputs, Stack, Tap
from models.storage import LayerSlice, Params, Weights
from ops import assignments
from ops import tokens as tk
from ops.signals import Signals
from ops.tokens import TokenSet

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Windows:
  """Partition of an image into windows, in raster order.

  Attributes:
    grid: (rows, columns) of patches.
    window: (rows, columns) of patches of a window.
    special: S, special tokens, which lead every row.

  Raises:
    ValueError: windows do not tile the grid.
  """

  grid: tuple[int, int]
  window: tuple[int, int]
  special: int = 0

  def __post_init__(self) -> None:
    if any(side < 1 or whole % side for whole, side in zip(self.grid, self.window, strict=True)):
      raise ValueError(f'windows of {self.window[0]} x {self.window[1]} patches do not tile a grid '
                       f'of {self.grid[0]} x {self.grid[1]}: choose divisors of its sides')

  @property
  def across(self) -> int:
    """Windows side by side."""
    return self.grid[1] // self.window[1]

  @property
  def count(self) -> int:
    """W, windows of an image."""
    return self.grid[0] // self.window[0] * self.across

  def slots(self, total: int) -> int:
    """Slots of a window of an image with N = `total` slots.

    Raises:
      ValueError: the windows would differ.
    """
    each, rest = divmod(total - self.special, self.count)
    if rest:
      raise ValueError(f'{total - self.special} tokens (special ones not counted) cannot be shared '
                       f'by {self.count} windows: budget for a multiple of {self.count} (keep or '
                       f'remove), such as {each * self.count}')
    return self.special + each

  def arrange(self, tokens: TokenSet) -> TokenSet:
    """Fresh tokens with their patches in window order: raster order within raster order."""
    order = np.concatenate([np.arange(self.special), self.special + self._raster().reshape(-1)])
    src = jnp.broadcast_to(jnp.asarray(order, jnp.int32), tokens.x.shape[:2])
    return tk.reduce(tokens, assignments.Gather(src, tokens.slots))

  def fold(self, tokens: TokenSet) -> TokenSet:
    """Tokens in window order [B, N] -> a row a window, [B * W, n]; pos and owner become its own."""
    each = self.slots(tokens.slots) - self.special
    (high, wide), columns, special = self.window, self.grid[1], self.special
    pos = tokens.pos
    pos = jnp.where(pos < 0, pos, pos // columns % high * wide + pos % columns % wide)
    lead, patches = tokens.owner[:, :special], tokens.owner[:, special:]
    owner = jnp.concatenate([lead, patches[:, self._raster().reshape(-1)]], axis=1)
    owner = self.fold_values(owner)
    owner = jnp.where(owner < special, owner, owner - each * self._index(len(owner)))
    rest = self._values(tokens, self.fold_values)
    return tokens.replace(**rest, pos=self.fold_values(pos), owner=owner)

  def unfold(self, tokens: TokenSet) -> TokenSet:
    """The inverse of `fold`: [B * W, n] -> [B, N]; features of special tokens are averaged."""
    each, (high, wide), special = tokens.slots - self.special, self.window, self.special
    index, pos = self._index(len(tokens.pos)), tokens.pos
    pos = jnp.where(pos < 0, pos, (index // self.across * high + pos // wide) * self.grid[1]
                    + index % self.across * wide + pos % wide)
    owner = jnp.where(tokens.owner < special, tokens.owner, tokens.owner + each * index)
    owner = self.unfold_values(owner)
    back = np.argsort(self._raster().reshape(-1))
    owner = jnp.concatenate([owner[:, :special], owner[:, special:][:, back]], axis=1)
    rest = self._values(tokens, self.unfold_values)
    return tokens.replace(**rest, pos=self.unfold_values(pos), owner=owner)

  def fold_values(self, values: Array, *, axis: int = 1) -> Array:
    """[B, N, ...] -> [B * W, n, ...]; another `axis` than 1 may hold the N slots."""
    values = jnp.moveaxis(values, axis, 1)
    batch, total, *rest = values.shape
    lead, patches = values[:, None, :self.special], values[:, self.special:]
    lead = jnp.broadcast_to(lead, (batch, self.count, self.special, *rest))
    patches = patches.reshape(batch, self.count, -1, *rest)
    folded = jnp.concatenate([lead, patches], axis=2)
    return jnp.moveaxis(folded.reshape(batch * self.count, self.slots(total), *rest), 1, axis)

  def unfold_values(self, values: Array) -> Array:
    """[B * W, n, ...] -> [B, N, ...]; special tokens' floats are averaged over the windows."""
    rows, _, *rest = values.shape
    values = values.reshape(rows // self.count, self.count, -1, *rest)
    lead, patches = values[:, :, :self.special], values[:, :, self.special:]
    floats = jnp.issubdtype(values.dtype, jnp.floating)
    lead = lead.mean(axis=1) if floats else lead[:, 0]
    return jnp.concatenate([lead, patches.reshape(rows // self.count, -1, *rest)], axis=1)

  def _values(self, tokens: TokenSet, change: Any) -> dict[str, Any]:
    """The fields that hold nothing but values."""
    fields = {name: getattr(tokens, name) for name in ('x', 'kind', 'valid', 'size', 'stats')}
    return jax.tree.map(change, fields)

  def _raster(self) -> np.ndarray:
    """int[W, patches of a window]: the raster place of every patch of every window."""
    (rows, columns), (high, wide) = self.grid, self.window
    indices = np.arange(rows * columns).reshape(rows // high, high, columns // wide, wide)
    return indices.transpose(0, 2, 1, 3).reshape(self.count, high * wide)

  def _index(self, rows: int) -> Array:
    """int32[B * W, 1], the window of each row."""
    return jnp.arange(rows, dtype=jnp.int32)[:, None] % self.count


class WindowStack(Stack):
  """A stack whose layers and reductions stay in windows.

  Attributes:
    grid: (rows, columns) of a window, which is what methods see.
    windows: how the image is cut.
    whole: layers whose attention sees the whole image. A cut there still acts window by window.
  """

  windows: Windows = dataclasses.field(kw_only=True)
  whole: tuple[int, ...] = ()

  def __call__(  # type: ignore[override]  # No tap reads windows.
      self, tokens: TokenSet) -> tuple[TokenSet, Outputs]:
    """Runs the layers on fresh tokens in raster order; returns tokens in window order.

    Raises:
      ValueError: as `Stack`; a budget that windows cannot share, a layer that is not there, or a
        cut inside the attention of a whole layer.
    """
    self._check()
    windows = self.windows
    tokens, out = super().__call__(windows.fold(windows.arrange(tokens)))
    for name in ('before', 'cuts', 'expanded', 'branches'):
      out[name] = {layer: windows.unfold(cut) for layer, cut in out[name].items()}
    out['hidden'] = [windows.unfold_values(x) for x in out['hidden']]
    out['budgets'] = tuple(kept if kept is None else kept.reshape(-1, windows.count).sum(axis=1)
                           for kept in out['budgets'])
    for name, total in (('losses', jnp.mean), ('overflow', jnp.sum)):
      out[name] = {key: total(value.reshape(-1, windows.count), axis=1)
                   for key, value in out[name].items()}
    return windows.unfold(tokens), out

  def _check(self) -> None:
    missing = sorted(set(self.whole) - set(range(self.depth)))
    if missing:
      raise ValueError(f'whole_layers has {missing[0]}, but the layers are 0 to {self.depth - 1}')
    if self.plan is None:
      return
    for event in self.plan.events:
      if event.kind == 'expand':
        continue
      name, slots = event.reduction.name, self.windows.slots(event.slots_in)
      keep = self.windows.slots(event.slots_out)
      least = event.method.min_slots(slots, self.windows.special)
      if keep < least:
        raise ValueError(f'{name} cannot leave {keep} of the {slots} slots of a window in layer '
                         f'{event.layer}: it leaves at least {least}')
      if event.parts == 'core':
        raise ValueError(f'{name} says who attends to whom in layer {event.layer}, where windows '
                         'do: take it out, or the windows')
      if event.layer in self.whole and (event.site == 'inside' or event.parts not in ('', 'mlp')):
        acts = 'is a branch of' if event.parts else 'cuts inside'
        raise ValueError(f'{name} {acts} the attention of layer {event.layer}, which sees '
                         'the whole image: take it out of whole_layers, or of the cuts')

  def _stages(self, weights: Weights, begins: Collection[int]) -> Iterator[tuple[int, int]]:
    """A whole layer runs alone, as its attention is not that of its neighbours."""
    for start, stop in super()._stages(weights, begins):
      edges = {edge for layer in self.whole for edge in (layer, layer + 1) if start < edge < stop}
      yield from itertools.pairwise(sorted({start, stop} | edges))

  def _attend(self, index: int | Array, layer: Callable[..., Any], tokens: TokenSet,
              needs: frozenset[str], tap: Tap | None,
              asking: Sequence[Reduction] = ()) -> tuple[TokenSet, Signals]:
    """Attention of a layer; in a whole layer it sees all windows of an image."""
    if not self._is_whole(index):
      return super()._attend(index, layer, tokens, needs, tap, asking)
    tokens, signals = super()._attend(index, layer, self.windows.unfold(tokens), needs, tap, asking)
    return self.windows.fold(tokens), self._fold_signals(signals)

  def _layer(self, params: Params | LayerSlice, index: int | Array, key: Array | None,
             method: str, tokens: TokenSet, *args: Any, **kwargs: Any) -> Any:
    """Runs one method of a block; looked ahead to, a whole layer sees all windows too."""
    run = functools.partial(super()._layer, params, index, key, method)
    if method != 'probe' or not self._is_whole(index):
      return run(tokens, *args, **kwargs)
    return self._fold_signals(run(self.windows.unfold(tokens), *args, **kwargs))

  def _is_whole(self, index: int | Array) -> bool:
    """Whether attention sees the whole image; inside a loop the index is traced, and none does."""
    return isinstance(index, int) and index in self.whole

  def _fold_signals(self, signals: Signals) -> Signals:
    """Folds the signals of whole images into those of their windows."""
    return signals.map_slots(lambda values, axis: self.windows.fold_values(values, axis=axis))

  def _of_row(self, event: Event) -> Event:
    """An event of an image as that of each of its windows, which share its budget evenly."""
    windows, step = self.windows, event.step
    if step is not None:
      step = dataclasses.replace(step, keep=_Shared(step.keep, windows.count))
    return dataclasses.replace(event, slots_in=windows.slots(event.slots_in),
                               slots_out=windows.slots(event.slots_out), step=step)


@dataclasses.dataclass(frozen=True)
class _Shared:
  """Leaves a window its even share of what a rule leaves an image of such windows."""

  rule: Callable[[Any, Any], Any]
  windows: int

  def __call__(self, now: Any, start: Any) -> Any:
    return self.rule(now * self.windows, start * self.windows) // self.windows
