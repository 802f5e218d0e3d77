"""Buckets of capacities, so that adaptive token counts save time.

Axes: B batch, R rows that share a bucket, N slots.

Under jit an adaptive method leaves a fixed capacity of slots, some of them padding, and padding
costs as much as tokens. So the model is cut in two behind the layer where the method first decides.
The first half runs at full capacity; the host reads how many tokens are real; the second half was
compiled once for each of a few capacities, and the smallest one that holds them runs.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections import Counter
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from models.backbones.vit import ViT
from models.plans.needs import FREE_OF_ATTENTION
from models.storage import Params
from ops import tokens as tk
from ops.assignments import Gather
from ops.tokens import TokenSet

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Answer:
  """Holds the outputs of `Buckets` for a batch.

  Attributes:
    logits: float32[B, ...], in the order of the images.
    counts: int[B], real tokens behind the first cut.
    capacity: int[B], slots that the second half had for the row.
  """

  logits: Array
  counts: np.ndarray
  capacity: np.ndarray


class Buckets:
  """Runs a model under an adaptive plan in two halves; call it with images float[B, S, S, C].

  Each capacity gives the same logits (to rounding), as padding changes nothing. A later cut asks
  its method only where it has more slots than it keeps, so buckets of fewer are raised to that.

  Args:
    vit: a model whose plan has an adaptive method.
    params: its parameters, in either storage (models/storage.py).
    sizes: capacities in slots, special tokens included; None for four even steps up to the cut's
      own. Rows that fit in none run at the cut's own capacity, and count as overflow.
    rows: R: a batch is sorted by count and its rows share buckets R at a time, so that a few hard
      images do not slow down easy ones. None for the whole batch in one.

  Attributes:
    layer: the layer of the first cut.
    sizes: the capacities, rising.
    full: the cut's own capacity.
    compiled: {(batch, rows, capacity): seconds}, programs of the second half so far.
    runs: {capacity: groups of rows that ran in it}.
    overflow: rows that had more tokens than the largest bucket.
    beyond: tokens that the method wanted to keep beyond its own capacity, at the first cut.

  Raises:
    ValueError: no adaptive plan, sizes that no count can have, or a model that cannot be cut there.
  """

  def __init__(self, vit: ViT, params: Params, *, sizes: Sequence[int] | None = None,
               rows: int | None = None) -> None:
    if vit.plan is None or not vit.plan.events or not vit.plan.events[0].method.adaptive:
      name = vit.plan.name if vit.plan else 'none'
      raise ValueError(f'{name} leaves as many tokens in every image: buckets need a plan with '
                       'cuts by an adaptive method')
    first, *later = vit.plan.events
    check_split(vit, first.layer)
    self.layer, self.full = first.layer, first.slots_out
    least = 1 + (later[0].slots_out if later else vit.host.protected)
    if sizes is None:
      sizes = np.linspace(least, first.slots_out, 5).round().astype(int)[1:].tolist()
    if not sizes or min(sizes) < 1 or max(sizes) > first.slots_out:
      raise ValueError(f'buckets of {tuple(sizes)} slots do not fit a cut that leaves '
                       f'{first.slots_out}: give sizes from 1 to {first.slots_out}')
    self.sizes = tuple(sorted({max(size, least) for size in sizes}))
    self.rows = rows
    self.compiled: dict[tuple[int, int, int], float] = {}
    self.runs: Counter[int] = Counter()
    self.overflow = self.beyond = 0
    self._params = params
    self._first = jax.jit(functools.partial(first_half, vit, first.layer))
    self._second = functools.partial(second_half, vit, first.layer)
    self._programs: dict[tuple[int, int, int], jax.stages.Compiled] = {}

  def __call__(self, images: Array) -> Answer:
    """Runs a batch.

    Raises:
      ValueError: the batch cannot be divided into groups of `rows`.
    """
    batch = len(images)
    group = self.rows or batch
    if batch % group:
      raise ValueError(f'a batch of {batch} cannot be divided into groups of rows={group}: choose '
                       'a divisor')
    tokens, counts, beyond = self._first(self._params, images)
    counts = np.asarray(counts)
    order = np.argsort(counts, kind='stable') if group < batch else np.arange(batch)
    parts, capacity = [], np.zeros(batch, int)
    for start in range(0, batch, group):
      index = order[start:start + group]
      size = self.pick(counts[index].max())
      parts.append(self._program(size, tokens, index)(self._params, tokens, index))
      capacity[index] = size
      self.runs[size] += 1
    self.overflow += int((counts > self.sizes[-1]).sum())
    self.beyond += int(beyond)
    logits = parts[0] if len(parts) == 1 else jnp.concatenate(parts)[np.argsort(order)]
    return Answer(logits, counts, capacity)

  def pick(self, count: int) -> int:
    """Returns the smallest bucket that holds `count` tokens, the full capacity where none does."""
    return next((size for size in self.sizes if size >= count), self.full)

  def warm(self, images: Array) -> None:
    """Compiles every bucket for batches like this one, so that no later call has to."""
    tokens, _, _ = self._first(self._params, images)
    index = np.arange(self.rows or len(images))
    for size in {*self.sizes, self.full}:
      self._program(size, tokens, index)

  def _program(self, size: int, tokens: TokenSet, index: np.ndarray) -> jax.stages.Compiled:
    key = len(tokens.x), len(index), size
    if key not in self._programs:
      start = time.perf_counter()
      run = jax.jit(functools.partial(self._second, size))
      self._programs[key] = run.lower(self._params, tokens, index).compile()
      self.compiled[key] = time.perf_counter() - start
    return self._programs[key]


def first_half(vit: ViT, layer: int, params: Params,
               images: Array) -> tuple[TokenSet, Array, Array]:
  """Runs the model up to `layer`, that one included.

  Returns:
    Tokens with the real ones first, in their order; int32[B], the number of real ones; int32, the
    number of tokens that the method wanted to keep beyond its capacity.
  """
  tokens, out = vit.clone(layers=(0, layer + 1)).apply({'params': params}, images)
  order = jnp.argsort(~tokens.real, axis=1, stable=True).astype(jnp.int32)
  beyond = jnp.asarray(sum(jnp.sum(wanted) for wanted in out['overflow'].values()))
  packed = tk.reduce(tokens, Gather(order, tokens.slots))
  return packed, jnp.sum(packed.real, axis=1, dtype=jnp.int32), beyond


def second_half(vit: ViT, layer: int, size: int, params: Params, tokens: TokenSet,
                index: Array) -> Array:
  """Runs the model behind `layer` on the rows `index` and the first `size` slots, to its logits."""
  if len(index) < len(tokens.x):  # Else the group is the batch, in its order.
    tokens = jax.tree.map(lambda leaf: leaf[index], tokens)
  if size < tokens.slots:
    src = jnp.broadcast_to(jnp.arange(size, dtype=jnp.int32), (len(index), size))
    tokens = tk.reduce(tokens, Gather(src, tokens.slots))
  return vit.clone(layers=(layer + 1, vit.depth)).apply({'params': params}, tokens)[0]


def check_split(vit: ViT, layer: int) -> None:
  """Raises where a model cannot be cut in two behind a layer."""
  if layer + 1 == vit.depth:
    raise ValueError(f'the first cut is in layer {layer}, the last one, so nothing is left to '
                     'save: cut in an earlier layer')
  plan = vit.plan
  assert plan is not None
  for event in plan.at(layer + 1, 'before'):
    if event.method.needs - FREE_OF_ATTENTION:
      raise ValueError(f'{event.reduction.name} before layer {layer + 1} reads the attention of '
                       f'layer {layer}, which the first half keeps to itself: leave a layer '
                       'between these cuts')
