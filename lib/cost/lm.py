"""The cost of a language model, without running anything: prompt and cache, layer by layer.

Papers on pruning inside language models count differently and rarely say how: `CONVENTIONS` names
the ways that their tables come from, and tests/cost/test_lm_cost.py holds the tables. Two things
decide beside the formula: whether n is the visual tokens alone or the whole prompt, and whether the
layer that scores still counts as whole (it does: a cut before layer l saves from l on).

Axes: n tokens of a layer, D width, F MLP width, H heads, K kv heads, d features a head, V
vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import cast

import jax.numpy as jnp

from models.backbones.lm import LM
from models.plans.events import Plan, Tokens
from models.reduction import OF_RECENT, Reduction
from ops.reducers.base import CacheReducer
from ops.reducers.method import EvictingMethod

# A slot's position and its mask: of a layer, or of each head where these hold different tokens.
SHARED_BYTES = 4 + 1
BIAS_BYTES = 4  # More, where slots that stand for several tokens count as many.
START_BYTES = 4  # Where a row's answer begins, in each number of a position.
# Of an entry in a cache that evicts: by what its key is rotated, and a number that is taken down;
# and of a row, the tokens since the method was asked.
TURNED_BYTES, STAT_BYTES, SINCE_BYTES = 4, 4, 4
LOGIT_BYTES = 4
MAP_BYTES = 4  # A map that a method inside attention sees is float32.


@dataclasses.dataclass(frozen=True)
class Layer:
  """Holds the cost of one layer, for one row.

  Attributes:
    index: which layer.
    attention: n, slots that enter attention.
    mlp: slots that enter the MLP.
    cached: slots that stay in the cache after the prompt.
    macs: multiply-accumulates of its products over the prompt; causal attention counts whole, as
      it runs.
    weight_macs: of them those with parameters, which a layer that is frozen has no gradient of.
    kv_bytes: keys and values of the slots that are cached: what papers call the KV cache.
    allocated_bytes: all that is set aside: room for what is decoded, positions and masks too.
    weight_bytes: of all parameters that the layer reads.
    activation_bytes: of what its products read and write over the prompt, each once; attention is
      taken as fused.
  """

  index: int
  attention: int
  mlp: int
  cached: int
  macs: int
  weight_macs: int
  kv_bytes: int
  allocated_bytes: int
  weight_bytes: int
  activation_bytes: int


@dataclasses.dataclass(frozen=True)
class LMCost:
  """Holds a model's cost for one row.

  Attributes:
    lm: the model.
    slots: N of the prompt, padding included.
    room: tokens that may be decoded.
    layers: one Layer each.
  """

  lm: LM
  slots: int
  room: int
  layers: tuple[Layer, ...]

  @property
  def head(self) -> int:
    """MACs of the logits, which a prompt needs once."""
    return self.lm.width * self.lm.vocabulary

  @property
  def macs(self) -> int:
    """MACs of reading a prompt."""
    return sum(layer.macs for layer in self.layers) + self.head

  @property
  def decode_macs(self) -> int:
    """MACs of the first token that is decoded."""
    lm = self.lm
    cached = sum(self.read(layer, 1) for layer in self.layers)
    each = projections(lm) + 3 * lm.width * lm.mlp
    return lm.depth * each + 2 * cached * lm.heads * lm.head_width + self.head

  def read(self, layer: Layer, number: int) -> int:
    """Returns the entries that the decoded token of a number, from 1, reads in a layer."""
    cut = self.lm.cache_plan.at(layer.index) if self.lm.cache_plan else ()
    slots = layer.cached + number
    return cast(CacheReducer, cut[-1].method).read_slots(slots) if cut else slots

  def decoded(self, layer: int, tokens: int) -> int:
    """Returns how many of so many decoded tokens run a layer; those that a router skips count."""
    limits = (event.method.decode_steps(layer, self.lm.depth)
              for event in (self.lm.plan.at(layer, 'branch') if self.lm.plan else ()))
    return min([tokens, *(limit for limit in limits if limit is not None)])

  def answer_macs(self, tokens: int) -> int:
    """Returns the MACs of decoding an answer, each layer as often as it runs."""
    lm = self.lm
    total = tokens * self.head
    for layer in self.layers:
      count = self.decoded(layer.index, tokens)
      read = sum(self.read(layer, number) for number in range(1, count + 1))
      total += count * (projections(lm) + 3 * lm.width * lm.mlp)
      total += 2 * read * lm.heads * lm.head_width
    return total

  @property
  def kv_bytes(self) -> int:
    """Bytes of keys and values after the prompt."""
    return sum(layer.kv_bytes for layer in self.layers)

  @property
  def allocated_bytes(self) -> int:
    """Bytes of the cache as it is allocated."""
    return sum(layer.allocated_bytes for layer in self.layers)

  @property
  def weight_bytes(self) -> int:
    """Bytes of all parameters, in the dtype of the products."""
    return parameters(self.lm) * jnp.dtype(self.lm.dtype).itemsize

  @property
  def decode_weight_bytes(self) -> int:
    """Bytes of the parameters that one decoded token reads: all but the embeddings of other ids."""
    lm = self.lm
    unread = 0 if lm.tied else (lm.vocabulary - 1) * lm.width
    return (parameters(lm) - unread) * jnp.dtype(lm.dtype).itemsize

  @property
  def activation_bytes(self) -> int:
    """Bytes that the products read and write over a prompt; logits are float32."""
    lm = self.lm
    ends = (self.slots + 1) * lm.width * jnp.dtype(lm.dtype).itemsize
    return ends + LOGIT_BYTES * lm.vocabulary + sum(
        layer.activation_bytes for layer in self.layers)

  @property
  def attention_mean(self) -> float:
    """Slots that enter attention, averaged over the layers."""
    return sum(layer.attention for layer in self.layers) / len(self.layers)


def projections(lm: LM) -> int:
  """Numbers in the four products of an attention: D x (2 H + 2 K) d."""
  return 2 * lm.width * (lm.heads + lm.kv_heads) * lm.head_width


def layer_parameters(lm: LM) -> int:
  """Numbers in one block: seven products, the biases that a family has, and its norms."""
  biases = lm.qkv_bias * (lm.heads + 2 * lm.kv_heads) * lm.head_width
  norms = 2 * lm.width + lm.qk_norm * 2 * lm.head_width
  return projections(lm) + 3 * lm.width * lm.mlp + biases + norms


def parameters(lm: LM) -> int:
  """Number of parameters of the whole model, without those of learned reductions."""
  tables = (1 if lm.tied else 2) * lm.vocabulary * lm.width
  return tables + lm.depth * layer_parameters(lm) + lm.width


def of(lm: LM, slots: int, *, room: int = 0, originals: int | None = None,
       texts: int | None = None) -> LMCost:
  """Returns the cost of a model under its plans.

  Under positions='restart' the whole model runs again on what is left, and only that is cached; the
  first run goes no further than the cut.

  Args:
    lm: with its plans, which must be for prompts of `slots`.
    slots: N of a prompt, padding included.
    room: tokens that may be decoded after it.
    originals: tokens that attention and caches hold under virtual unmerging, where some were merged
      before the model; None for `slots`.
    texts: slots of text, which alone make queries under mask='composite', but for what methods
      read of others; None for all.

  Raises:
    ValueError: for plans that are about other prompts.
  """
  plan, cache_plan = lm.plan, lm.cache_plan
  if plan and plan.slots not in (None, slots):
    raise ValueError(f'the plan is for prompts of {plan.slots} slots, not {slots}: make one with '
                     'lm.host(slots)')
  if plan and plan.events and plan.positions == 'restart':
    last = plan.events[-1]
    again = of(lm.clone(plan=None), last.slots_out, room=room, texts=texts)
    passed = plan.profile(lm.depth, slots)
    through = last.layer + (last.site != 'before')
    return dataclasses.replace(again, slots=slots, layers=tuple(
        _both_runs(layer, _layer(lm, layer.index, tokens, 0, 0, texts=texts))
        if layer.index < through else layer
        for layer, tokens in zip(again.layers, passed, strict=True)))
  layers = []
  for index, tokens in enumerate((plan or Plan((), ())).profile(lm.depth, slots)):
    cached = cache_plan.at(index) if cache_plan else ()
    bias = BIAS_BYTES if plan and plan.proportional and tokens.queries < slots else 0
    held = cached[-1].slots_out if cached else tokens.queries
    if lm.unmerging != 'none':
      held, bias = slots if originals is None else originals, 0
    layer = _layer(lm, index, tokens, held, room, texts=texts,
                   own=(SHARED_BYTES + bias) * (lm.kv_heads if cached else 1))
    if cached:
      layer = _stored(lm, layer, cast(CacheReducer, cached[-1].method), room, bias)
    if cached and cached[-1].reduction.capacity:
      layer = _evicting(lm, layer, cached[-1].reduction, bias)
    layers.append(layer)
  return LMCost(lm, slots, room, tuple(layers))


def _stored(lm: LM, layer: Layer, method: CacheReducer, room: int, bias: int) -> Layer:
  """A layer whose method may store entries in a way of its own, and what comes later as ever."""
  stored = method.stored_bytes(layer.cached, lm.kv_heads, lm.head_width,
                               jnp.dtype(lm.dtype).itemsize)
  if stored is None:
    return layer
  kv_bytes, allocated = stored
  more = bias * layer.cached * lm.kv_heads + room * (kv_slot_bytes(lm) + SHARED_BYTES)
  return dataclasses.replace(
      layer, kv_bytes=kv_bytes,
      allocated_bytes=allocated + more + START_BYTES * (1 + len(lm.rope.sections)))


def _evicting(lm: LM, layer: Layer, reduction: Reduction, bias: int) -> Layer:
  """A layer whose cache stays within a capacity while the model decodes, however long."""
  method = cast(EvictingMethod, reduction.method)
  slots = max(layer.cached, reduction.capacity) + method.every
  turned = TURNED_BYTES * (reduction.positions == 'compact')
  own = lm.kv_heads * (SHARED_BYTES + bias + turned + STAT_BYTES * len(method.tracks))
  row = START_BYTES * (1 + len(lm.rope.sections)) + SINCE_BYTES
  if method.evict_needs & OF_RECENT:
    query = lm.heads * lm.head_width * jnp.dtype(lm.dtype).itemsize
    row += min(method.span, layer.attention) * (query + START_BYTES)
  return dataclasses.replace(layer, allocated_bytes=slots * (kv_slot_bytes(lm) + own) + row)


def _both_runs(layer: Layer, first: Layer) -> Layer:
  """A layer that runs on the whole prompt first, and then again on what is left."""
  return dataclasses.replace(layer, macs=layer.macs + first.macs,
                             weight_macs=layer.weight_macs + first.weight_macs,
                             activation_bytes=layer.activation_bytes + first.activation_bytes)


def _layer(lm: LM, index: int, tokens: Tokens, cached: int, room: int, *,
           own: int = SHARED_BYTES, texts: int | None = None) -> Layer:
  queries, values, attended, mlp = tokens.queries, tokens.values, tokens.attended, tokens.mlp
  inner, shared = lm.heads * lm.head_width, lm.kv_heads * lm.head_width
  asking, seen = queries, tokens.logits + tokens.weights
  if lm.unmerging != 'none':
    seen = 2 * cached ** 2
  if lm.mask == 'composite' and texts is not None and not (
      tokens.map_seen or index in lm.full_layers):
    asking = min(texts, queries)
    seen = 2 * asking * queries
  projected = inner * (asking + attended) + shared * (queries + values)
  weighted = lm.width * projected + 3 * mlp * lm.width * lm.mlp
  slot, size = kv_slot_bytes(lm), jnp.dtype(lm.dtype).itemsize
  # Projections write what attention reads; both read or write the width, the MLP twice.
  moved = lm.width * (queries + attended) + 2 * projected + mlp * (2 * lm.width + 3 * lm.mlp)
  moved += tokens.map_seen * 2 * lm.heads * (tokens.logits + tokens.weights) * MAP_BYTES // size
  return Layer(index, queries, mlp, cached, weighted + inner * seen, weighted, cached * slot,
               (cached + room) * (slot + own) + START_BYTES * (1 + len(lm.rotation.sections)),
               layer_parameters(lm) * size, moved * size)


def kv_slot_bytes(lm: LM) -> int:
  """Bytes of one token's keys and values in one layer: 2 K d numbers."""
  return 2 * lm.kv_heads * lm.head_width * jnp.dtype(lm.dtype).itemsize


# -- what papers count ---------------------------------------------------------------------------

# Tokens a layer -> the model's operations, whatever the paper calls them.
Convention = Callable[[LM, Sequence[int]], int]


def exact(lm: LM, counts: Sequence[int]) -> int:
  """MACs of all products, kv heads as they are, logits of one token."""
  return lm.width * lm.vocabulary + sum(
      _layer(lm, 0, Tokens(n, n, n, n, n), n, 0).macs for n in counts)


def mac3(lm: LM, counts: Sequence[int]) -> int:
  """4nD² + 2n²D + 3nDF a layer, blocks alone, kv heads as many as heads.

  PyramidDrop (arXiv:2410.17247), TransPrune, HiDrop and CATP with n the visual tokens; SparseVLM
  (arXiv:2410.04417, released code) with n the whole prompt.
  """
  width, mlp = lm.width, lm.mlp
  return sum(4 * n * width ** 2 + 2 * n ** 2 * width + 3 * n * width * mlp for n in counts)


def mac2(lm: LM, counts: Sequence[int]) -> int:
  """4nD² + 2n²D + 2nDF a layer: FastV (arXiv:2403.06764, Sec. 4.2), an MLP of two products."""
  width, mlp = lm.width, lm.mlp
  return sum(4 * n * width ** 2 + 2 * n ** 2 * width + 2 * n * width * mlp for n in counts)


def viewer(lm: LM, counts: Sequence[int]) -> int:
  """Two for each multiply-accumulate, and what surrounds them: AIM (arXiv:2412.03248, its code).

  Softmax 5 H n², each of two norms 7nD, residual additions nD, the activation 2nD; the logits once.
  """
  width, inner = lm.width, lm.heads * lm.head_width
  total = width * lm.vocabulary
  for n in counts:
    total += 2 * n * (projections(lm) + 3 * width * lm.mlp)
    total += 4 * n ** 2 * inner + 5 * lm.heads * n ** 2
    total += 2 * 7 * n * width + 2 * n * width + 2 * n * width
  return total


CONVENTIONS: dict[str, Convention] = {
    'exact': exact,
    'mac3': mac3,
    'mac2': mac2,
    'viewer': viewer,
}
