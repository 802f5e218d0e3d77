"""Decoder-only language models: Llama 2 and 3, Vicuna, Mistral, Qwen 2, 2.5 and 3, as one block.

Llama (Touvron et al., 2023), arXiv:2302.13971, arXiv:2307.09288 and 2407.21783; Mistral 7B,
arXiv:2310.06825; Qwen 2 and 3, arXiv:2407.10671 and 2505.09388; grouped queries from
arXiv:2305.13245, SwiGLU from arXiv:2002.05202, RMSNorm from arXiv:1910.07467. What a family sets is
data, in models/families.py; models/checkpoints/lm_config.py makes models of it, and of a
checkpoint's config.json.

INTERFACE
  lm = make_lm('llama2_7b', dtype=jnp.bfloat16)  # models/checkpoints/lm_config.py; or from_config
  host = lm.host(slots, visual=576)              # N of the prompt, and slots of a kind in it
  lm = lm.clone(plan=make_plan(config, host))                # models/plans/make.py
  lm = lm.clone(cache_plan=make_cache_plan(config, host, plan=lm.plan))       # on the cache
  lm = with_plans(lm, language=config, cache=config, visual=576)(slots)     # both
  logits, out = lm.apply({'params': p}, tokens)        # all tokens that are left, training too
  logits, cache = lm.apply({'params': p}, tokens, room=64, method='prefill')  # the last real one
  logits, cache = lm.apply({'params': p}, ids, cache, method='decode')        # donate the cache
  logits, cache = lm.apply({'params': p}, chunk, cache, method='extend')      # several tokens
* `tokens` are ids int[B, N] (with `valid=` bool[B, N]), or a TokenSet of embeddings (`lm.embed`
  makes them of ids): `pos` the index in the sequence, real tokens in ascending order, padding
  anywhere (left, right, or between a row's image and its text); `kind` VISUAL, TEXT or SPECIAL,
  for padding too, since a plan's `of` counts slots by kind. For M-RoPE `pos` is int[B, N, P]:
  column 0 the index in the sequence, by which attention is causal, then one a section.
* Plans count slots: another length is an error, and parameters are made without plans (`init`).
  `Generator` (models/decoding/generator.py) pads prompts to few lengths; `with_plans` resolves the
  plans of each.
* Attention is causal by `pos`, RoPE rotates by `pos`; a slot's index means nothing. After a cut
  slots are sorted by `pos`; a merged slot takes the latest of its group.
* A method gets the static number of slots of other kinds as `tokens.protected`, and padding among
  them; `tokens.budget` says how many tokens of `of` each row keeps, by its own real tokens. The
  last real token of a prompt is held, unless a config says holds='none'. Text alone is
  `kind == TEXT`.
* A branch (site 'branch') lets some tokens run a part of a layer, and none leaves. The layer's
  cache holds the keys that its attention saw; decoded tokens run the layer unless the method says
  otherwise (`decode_steps`, `route`), and leave nothing in the cache of one that they skip.
* Signals (ops/signals.py): keys and values [B, N, K, d] (rotated), queries, plain_queries
  [B, N, H, d], last_attention [B, H, N], window_attention [B, H, W, N] (W = method.span),
  row_attention [B, H, N] (mean over method.rows(tokens), bool[B, N]), received_attention [B, H, N];
  next_last_attention, next_row_attention, next_received_attention, next_keys, next_queries,
  next_hidden of the next layer on the current tokens; hidden, hidden_in, attention_out, mlp_in,
  mlp_out, mlp_hidden; rope, layer, depth, slots. Methods name them in `needs`, and in `watch_needs`
  for `watch`.
* Methods between layers return an Assignment as anywhere; `positions` ('keep', 'anchor',
  'compact', 'restart') is an attribute of the method, or of the config. Methods on the cache (site
  = 'cache', ops/reducers/cache) are called as method(tokens, signals, num_slots=M) once a layer,
  after its attention, and return an ops.kv_cache.KVAnswer, as KVGather(src int32[B, K, M],
  valid=None): M slots a kv head, padding last; ops/caches has others, of heads that keep different
  numbers. `keep` counts slots of the layer's own; `rounding` is 'floor' by default. With `capacity`
  the method also makes room while the model decodes (ops/reducers/method.py, `EvictingMethod`), and
  `room` is of no account in the layers that it keeps.

Axes: B batch, N slots now, T original tokens, D width, H heads, K kv heads, d width of a head, V
vocabulary, S slots of a cache, F MLP width, P numbers in a position.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Annotated, Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from models.backbones.lm_block import Block, rms_norm, unmerged
from models.backbones.masks import EXCEPTIONS, MASKS, apart_by_summaries, with_stats
from models.memory import Memory, Reader, Recall, check_reader
from models.plans.events import POSITIONS, Plan
from models.plans.hosts import Host
from models.plans.row_budgets import entry_budget
from models.reduction import (
  BATCH_AXES,
  ReducerParameters,
  cache_needs,
  choose,
  keep_up,
  start_upkeep,
)
from models.stack import REMAT, Outputs, Stack, Tap
from models.storage import gathered
from ops import choices
from ops.attention import log_weight
from ops.kv_cache import KV, Cache, KVAnswer, LayerCache, with_upkeep
from ops.masks import FRAME, SUMMARY, frames_begun
from ops.moves.rows import take
from ops.rope import V2PE_STEPS, Rope, sequence_index, v2pe_steps
from ops.signals import Signals
from ops.tokens import TEXT, VISUAL, TokenSet
from ops.values import Count, CountOrZero, Depth, NotNegative, OneOf, Width, check_fields

Array = jax.Array

OFFERS = frozenset({
    'attention', 'keys', 'queries', 'values', 'plain_queries', 'received_attention',
    'last_attention', 'window_attention', 'window_queries', 'row_attention',
    'next_received_attention', 'next_last_attention', 'next_row_attention', 'next_keys',
    'next_queries', 'next_hidden', 'hidden', 'hidden_in', 'attention_out', 'mlp_in', 'mlp_out',
    'mlp_hidden',
    'projected_norms', 'rope', 'layer', 'depth', 'slots', 'one_sequence'})
# What the last chunk of a prompt tells of all its tokens.
LAST_CHUNK = frozenset({'keys', 'values', 'last_attention', 'window_attention', 'window_queries'})
UNMERGINGS = ('none', 'virtual')


class LM(nn.Module):
  """A decoder-only language model; see the head of this file for how it is used.

  Attributes:
    width, depth, mlp, heads, kv_heads, head_width: of the blocks, as there.
    vocabulary: V, token ids.
    context: the longest sequence that it was made for, prompt and answer together.
    tied: whether logits are products with the embeddings, else with a head of their own.
    rope, window, qkv_bias, qk_norm, norm_eps: see `Block`.
    mask: what a token of the prompt sees: 'causal'; 'mutual', where visual tokens also see the
      question that follows them (AKI, arXiv:2503.02597): the bool stat 'question' of the tokens, by
      default all text after the last image, so that a sequence that holds an answer must name it;
      'summary', where tokens behind the last `summary_token` see nothing before the first one, nor
      does what is decoded (VoCo-LLaMA, arXiv:2406.12275); 'composite', where a token that is no
      text sees itself alone, so that a layer aligns it by its values, output product and MLP
      (EE-MLLM, arXiv:2408.11795, after its abstract; no code was released): where a sequence says
      how many slots of text it has (`TokenSet.texts`) no other slot makes a query; 'frames', where
      tokens of a frame also see those behind them in it (the frame-wise block causal mask of
      TC-LLaVA, arXiv:2409.03206), by the stat 'frame' int32[B, N] of the tokens, -1 for none, by
      default 'group', a frame an image, else one frame of all visual tokens; its attention is
      XLA's; or 'full', all tokens. What is decoded sees all else that came before, and is seen by
      no earlier token.
    full_layers: layers whose causal mask is removed (Dukic and Snajder, 2024, arXiv:2401.14556).
    unmerging: 'virtual', where attention runs among the original tokens of merged ones, each at its
      own position, and its answers are averaged (DyMU, arXiv:2504.17040); caches hold as many
      entries as there were tokens. 'none': a slot is one token.
    summary_token: id of the tokens that stand for what came before them, under mask='summary'.
    visual_stride: by how many 1/256 of a position a visual token moves on, 1 to 256 (V2PE,
      arXiv:2412.09616, where it is a power of two); 0 for a whole one, as text. Positions are then
      int32[B, N, 2], the place in the sequence and 256ths.
    frame_stride: by how many positions a frame moves itself and all behind it on, beside the
      tokens' own places, 0 for none: rotations by the place and by the frame's number, one after
      the other, are one by place + frame_stride * frames that have begun (the temporal-aware dual
      RoPE of TC-LLaVA, arXiv:2409.03206; its abstract alone is known here, so the number of a
      frame, that text has the last one's, and the factor are ours). Frames are those of
      mask='frames', whose numbers must ascend in a sequence. Positions are int32[B, N, 2], the
      place and what is turned by.
    dtype: of the products; norms, softmax and logits are float32. Give parameters of this dtype to
      prefill and decode, which would otherwise convert them in every call.
    plan: how to reduce tokens between layers, or None.
    cache_plan: which entries of the cache to keep after the prompt, or None.
    implementation: of attention over a prompt: 'xla', 'cudnn' or 'splash' (ops/attention.py picks).
    mesh, remat, capture: see models/stack.py.
    reader: lets some layers read a memory (models/memory.py), or None; a compressor brings it.
  """

  vocabulary: Count
  width: Width
  depth: Depth
  mlp: Width
  heads: Count
  kv_heads: Count
  head_width: Width
  context: Count
  rope: Rope
  tied: bool = False
  window: CountOrZero = 0
  qkv_bias: bool = False
  qk_norm: bool = False
  norm_eps: NotNegative = 1e-5
  mask: Annotated[str, OneOf(MASKS)] = 'causal'
  full_layers: tuple[CountOrZero, ...] = ()
  summary_token: CountOrZero | None = None
  visual_stride: CountOrZero = 0
  frame_stride: CountOrZero = 0
  unmerging: Annotated[str, OneOf(UNMERGINGS)] = 'none'
  dtype: DTypeLike = jnp.float32
  implementation: str = 'xla'
  plan: Plan | None = None
  cache_plan: Plan | None = None
  mesh: Mesh | None = None
  remat: Annotated[str, OneOf(REMAT)] = 'none'
  capture: bool = False
  reader: Reader | None = None

  def __post_init__(self) -> None:
    check_fields(self)
    if self.reader:
      check_reader(self.reader, self.plan, depth=self.depth)
    if self.heads % self.kv_heads:
      raise ValueError(f'kv_heads={self.kv_heads} does not divide heads={self.heads}: each is '
                       'shared by as many queries as every other; change one of them')
    if self.rope.width != self.head_width:
      raise ValueError(f'rope.width={self.rope.width} and head_width={self.head_width} differ: a '
                       'rotation turns all features of a head; set both')
    if not 0 <= self.visual_stride <= V2PE_STEPS:
      raise ValueError(f'visual_stride={self.visual_stride} must be in 1 to {V2PE_STEPS}, or 0 for '
                       'one position a visual token')
    if self.visual_stride and self.rope.sections:
      raise ValueError(f'visual_stride={self.visual_stride} is for one position a token, and this '
                       f'model has M-RoPE with sections={self.rope.sections}: set it to 0')
    if self.frame_stride and (self.visual_stride or self.rope.sections):
      raise ValueError(f'frame_stride={self.frame_stride} is for one whole position a token: set '
                       'it to 0, or leave visual_stride and rope.sections out')
    odd = [f'{name}={value!r}' for name, value, usual in (
        ('mask', self.mask, 'causal'), ('full_layers', self.full_layers, ()),
        ('visual_stride', self.visual_stride, 0), ('frame_stride', self.frame_stride, 0),
        ('rope.sections', self.rope.sections, ()), ('cache_plan', self.cache_plan, None))
           if value != usual]
    if self.unmerging != 'none' and odd:
      raise ValueError(f'unmerging={self.unmerging!r} is for causal attention by one position a '
                       f"token and whole caches: leave {odd[0]} out, or set unmerging='none'")
    if self.mask in EXCEPTIONS and self.plan and any(
        event.parts == 'core' for event in self.plan.events):
      raise ValueError(f'{self.plan.name} chooses who attends to whom by itself, and so does '
                       f'mask={self.mask!r}: leave one of them out')
    if (self.mask == 'summary') != (self.summary_token is not None):
      raise ValueError(f'mask={self.mask!r} and summary_token={self.summary_token} do not go '
                       "together: set mask='summary' and the id of the token that sums up, or "
                       'neither')
    beyond = [layer for layer in self.full_layers if layer >= self.depth]
    if beyond:
      raise ValueError(f'full_layers names layer {beyond[0]}, and the model has layers 0 to '
                       f'{self.depth - 1}: leave it out')
    super().__post_init__()

  def host(self, slots: int, **counts: int) -> Host:
    """Returns what plans need to know of this model with prompts of `slots` slots.

    Args:
      slots: N, padding included.
      **counts: slots by kind, as visual=576 or special=1; all others are text.

    Raises:
      ValueError: for more slots of kinds than there are, or more than the context.
    """
    text = slots - sum(counts.values())
    if text < 0 or slots > self.context:
      raise ValueError(f'a prompt of {slots} slots with {counts or "text alone"} is impossible: '
                       f'the kinds must fit into the slots, and those into {self.context}')
    kinds = tuple(counts.items()) + ((('text', text),) if text else ())
    apart: dict[str, Any] = {}
    if self.unmerging != 'none':
      apart = {'sites': ('before', 'between', 'after')}
    positions = POSITIONS if self.unmerging == 'none' else ('keep',)
    return Host(self.depth, slots, 0, OFFERS, counts=kinds, positions=positions, holds='last',
                **apart)

  def setup(self) -> None:
    """Makes embeddings, blocks, the last norm and the head."""
    self.table = self.param('table', nn.initializers.normal(0.02), (self.vocabulary, self.width))
    slots = 'any' if self.plan and self.plan.masked else 'ordered'
    implementation = 'xla' if self.mask == 'frames' else self.implementation
    block = Block(self.width, self.heads, self.kv_heads, self.head_width, self.mlp, self.rotation,
                  self.window, self.qkv_bias, self.qk_norm, self.norm_eps, self.dtype,
                  implementation, self.mesh, slots, self.mask, self.unmerging, parent=None)
    full = (block.clone(mask='full', parent=None), self.full_layers) if self.full_layers else None
    self.stack = Stack(block, self.depth, self.plan, None, self.remat, self.mesh, self.capture,
                       causal=True, rope=self.rotation, others=full)
    self.reducers = ReducerParameters()
    self.norm = rms_norm(self.norm_eps)
    if not self.tied:
      self.head = nn.Dense(self.vocabulary, use_bias=False, dtype=self.dtype,
                           kernel_init=nn.initializers.normal(0.02), dot_general=self._product)

  @property
  def is_causal(self) -> bool:
    """Returns whether no token of a prompt sees a later one, in any layer."""
    return self.mask == 'causal' and not self.full_layers

  @property
  def reads_frames(self) -> bool:
    """Returns whether masks, positions or a method of the plan go by the stat 'frame'."""
    reductions = self.plan.reductions if self.plan else ()
    return self.mask == 'frames' or self.frame_stride > 0 or any(
        FRAME in reduction.method.reads for reduction in reductions)

  @property
  def rotation(self) -> Rope:
    """Returns how positions become rotations as the tokens carry them."""
    if not self.visual_stride and not self.frame_stride:
      return self.rope
    return dataclasses.replace(self.rope, sections=(self.rope.width // 2,),
                               steps=V2PE_STEPS if self.visual_stride else 1)

  def embed(self, ids: Array, valid: Array | None = None) -> TokenSet:
    """Looks up the embeddings of token ids.

    Args:
      ids: int[B, N], each below V.
      valid: bool[B, N], False for padding, wherever it is; None for none.

    Raises:
      ValueError: ids of another shape or dtype, or a mask of another shape.
    """
    if ids.ndim != 2 or not jnp.issubdtype(ids.dtype, jnp.integer):
      raise ValueError(f'token ids of shape {ids.shape} and dtype {ids.dtype} do not fit: expected '
                       'integers [batch, length]')
    if valid is not None and valid.shape != ids.shape:
      raise ValueError(f'a mask of shape {valid.shape} does not fit token ids of shape {ids.shape}')
    if valid is None:
      pos = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32), ids.shape)
    else:
      pos = jnp.maximum(jnp.cumsum(valid, axis=1, dtype=jnp.int32) - 1, 0)
    if self.rope.sections:
      # Text alone has its index on every axis.
      pos = jnp.broadcast_to(pos[..., None], (*pos.shape, 1 + len(self.rope.sections)))
    kind = jnp.full(ids.shape, TEXT, jnp.int8)
    stats = {SUMMARY: ids == self.summary_token} if self.mask == 'summary' else {}
    return TokenSet.create(self._embedded(ids), pos=pos, kind=kind, valid=valid,
                           of=(TEXT,), stats=stats)

  def __call__(self, tokens: Array | TokenSet,
               valid: Array | None = None) -> tuple[Array, Outputs]:
    """Returns scores of the next token after every token that is left.

    Args:
      tokens: ids int[B, N], or a TokenSet of embeddings.
      valid: with ids, as in `embed`.

    Returns:
      Logits float32[B, M, V], and a dict: 'tokens' (the final TokenSet, normed), with `capture`
      'embedded' float[B, N, D], and what models/stack.py adds.

    Raises:
      ValueError: tokens that do not fit, or more than the context.
    """
    read, out = self.read(tokens, valid)
    return self.logits(read.x), out

  def read(self, tokens: Array | TokenSet, valid: Array | None = None,
           memory: Memory | None = None) -> tuple[TokenSet, Outputs]:
    """Returns what `__call__` makes logits of, and its dict; `memory` is what the reader reads."""
    tokens = self._enter(tokens, valid)
    embedded = tokens.x
    tokens, out = self.stack(tokens, None, self._recall(memory))
    tokens = tokens.replace(x=self.norm(tokens.x))
    out['tokens'] = tokens
    if self.capture:
      out['embedded'] = embedded
    return tokens, out

  def _recall(self, memory: Memory | None) -> Recall | None:
    """Returns what layers read of a prompt's memory."""
    if memory is None or self.reader is None:
      return None
    return Recall(self.reader, self.reader.states(memory))

  def _recall_kept(self, kvs: Cache) -> Recall | None:
    """Returns what layers read of a memory that a cache carries."""
    return Recall(self.reader, kvs.memory.layers) if kvs.memory and self.reader else None

  def prefill(self, tokens: Array | TokenSet, valid: Array | None = None, *,
              room: int, memory: Memory | None = None) -> tuple[Array, Cache]:
    """Reads a prompt.

    Args:
      tokens, valid: as in `__call__`. The plan must leave the latest real token of every row,
        whose logits are returned.
      room: number of tokens that may be decoded after the prompt.
      memory: what the reader reads, or None.

    Returns:
      Logits float32[B, V] after the last real token, and the cache.

    Raises:
      ValueError: as `__call__`; or a prompt that with its answer exceeds the context.
    """
    tokens = self._enter(tokens, valid, room)
    if self.plan and self.plan.positions == 'restart':
      again = self.clone(plan=None, parent=None)
      return cast(tuple[Array, Cache], again.apply(
          {'params': self.variables['params']}, self._restarted(tokens), room=room,
          method='prefill'))
    cache_plan = self.cache_plan
    needs = frozenset({'keys', 'values'})
    if cache_plan:
      needs |= cache_needs(cache_plan.only)
    tap = Tap(needs, functools.partial(self._store, self._next_position(tokens), room),
              _starts(cache_plan), cache_plan.only if cache_plan else None)
    recall = self._recall(memory)
    tokens, out = self.stack(tokens, tap, recall)
    cache = Cache(tuple(out['taps']), jnp.zeros((), jnp.int32), recall and recall.kept)
    return self.logits(self.norm(_last(tokens, tokens.x))), cache

  def _store(self, start: Array, room: int, layer: int, tokens: TokenSet,
             signals: Signals) -> LayerCache:
    """Keys and values of a layer as its cache, reduced by the cache plan.

    Args:
      start: int32[B(, P)], the position of the first token to be decoded.
      room: number of tokens that may be decoded.
      layer: the first of the equal layers that run together.
      tokens, signals: of the layer's attention.
    """
    plan, proportional = self.plan, bool(self.plan and self.plan.proportional)
    if self.unmerging != 'none':
      tokens, signals = unmerged(self.rope, tokens, signals)
    k, v = (jnp.swapaxes(x, 1, 2) for x in (signals.keys, signals.values))
    bias = log_weight(tokens.size) if proportional and tokens.size is not None else None
    compact = plan is not None and plan.positions == 'compact'
    seen = tokens.real
    if self.mask == 'summary':
      seen &= ~apart_by_summaries(tokens).keys
    kv = KV.create(k, v, pos=sequence_index(tokens.pos), valid=seen, filled=tokens.slots, bias=bias,
                   start=self._next_position(tokens) if compact else start)
    return self._reduce_cache(kv, layer, tokens, signals).with_room(room)

  def _reduce_cache(self, kv: KV, layer: int, tokens: TokenSet, signals: Signals) -> LayerCache:
    """A layer's cache with the entries that the cache plan keeps."""
    for event in self.cache_plan.at(layer) if self.cache_plan else ():
      if event.slots_in != tokens.slots:
        raise ValueError(f'the plan of the cache is for {event.slots_in} slots in layer '
                         f'{layer}, which sees {tokens.slots}: make one with lm.host(slots) and '
                         'plan=lm.plan')
      reduction, place = event.reduction, self.stack.place
      with jax.named_scope('reduction'):
        if reduction.capacity:
          kv = start_upkeep(event, kv, tokens, signals, place)
        reduced: LayerCache = kv
        if reduction.asks(event):
          params = self.reducers(event, tokens, signals, place)
          own = tokens.replace(budget=entry_budget(event, tokens))
          answer: KVAnswer = choose(event, own, signals, place, params=params)
          reduced = answer.shrink(kv, positions=reduction.positions, rope=self.rotation)
        if reduction.capacity:
          reduced = with_upkeep(cast(KV, reduced), event.method, capacity=reduction.capacity,
                                positions=reduction.positions, rope=self.rotation)
        return reduced
    return kv

  def decode(self, ids: Array, kvs: Cache) -> tuple[Array, Cache]:
    """Reads one more token a row.

    It writes into the cache in place where it is donated and the blocks' parameters are a tuple
    (models/storage.py, `unstack`), and copies neither. Beyond the cache's room it would overwrite
    the last token: the caller counts (models/decoding/generator.py does).

    Args:
      ids: int[B], the tokens.
      kvs: the cache that `prefill` or the last call returned.

    Returns:
      Logits float32[B, V] after them, and the cache.
    """
    x, kvs = self._decode(self._embedded(ids), kvs)
    return self.logits(self.norm(x)), kvs

  def _decode(self, x: Array, kvs: Cache, valid: Array | None = None) -> tuple[Array, Cache]:
    """Features float[B, D] after one more token a row, of those that have one, and the cache."""
    (x, step, _), layers = self.stack.step((x, kvs.steps, valid), kvs.layers,
                                           recall=self._recall_kept(kvs))
    place = self.stack.place
    kept = (kv if kv.upkeep is None else keep_up(kv, signals, valid, layer, place)
            for layer, (kv, signals) in enumerate(layers))
    if valid is not None:
      # A row without a token goes on from the same position.
      kept = (kv.with_start(kv.start - ~valid.reshape(-1, *(1,) * (kv.start.ndim - 1)))
              for kv in kept)
    return x, kvs.replace(layers=tuple(kept), steps=step + 1)

  def _read_one_by_one(self, tokens: TokenSet, kvs: Cache) -> tuple[Array, Cache]:
    """Features float[B, C, D] of a chunk, and the cache, which makes room after every token."""
    reader = self.reader and self.reader.clone(parent=None, name=None)
    lm, params = self.clone(parent=None, reader=reader), {'params': self.variables['params']}

    def read(kvs: Cache, item: tuple[Array, Array]) -> tuple[Cache, Array]:
      x, kvs = cast(tuple[Array, Cache], lm.apply(params, item[0], kvs, item[1], method='_decode'))
      return kvs, x

    items = (jnp.swapaxes(tokens.x, 0, 1), tokens.real.T)
    kvs, x = jax.lax.scan(read, kvs, items)
    return jnp.swapaxes(x, 0, 1), kvs

  def empty_cache(self, rows: int, slots: int) -> Cache:
    """Returns a cache of nothing, for a prompt that is read in chunks.

    Args:
      rows: B.
      slots: of all chunks together.
    """
    self._check_length(slots, 0)
    shape = (rows, self.kv_heads, slots, self.head_width)
    pos = jnp.zeros((rows, slots), jnp.int32)
    start = (rows, 1 + len(self.rope.sections)) if self.rope.sections else (rows,)
    kv = KV.create(jnp.zeros(shape, self.dtype), jnp.zeros(shape, self.dtype), pos=pos,
                   valid=jnp.zeros(pos.shape, bool), start=jnp.zeros(start, jnp.int32), filled=0)
    return Cache((kv,) * self.depth, jnp.zeros((), jnp.int32))

  def extend(self, tokens: Array | TokenSet, kvs: Cache, valid: Array | None = None, *,
             room: int | None = None, logits: str = 'last') -> tuple[Array, Cache]:
    """Reads a chunk of tokens into a cache, each over all before it.

    A prompt that is read in chunks gives what it gives in one:
      cache = lm.empty_cache(rows, slots)
      for chunk in chunks[:-1]:
        _, cache = lm.apply(variables, chunk, cache, method='extend')          # donate the cache
      logits, cache = lm.apply(variables, chunks[-1], cache, room=64, method='extend')
    What follows a prompt that `prefill` read and the cache plan cut (a question on its context)
    goes uncut behind it: `cache.take(rows)` repeats the context for several questions.

    Chunks of one shape share a program. A cache that evicts reads the tokens of a chunk one by one.
    Reductions between layers act on what `prefill` reads alone. Padding in a chunk, on whichever
    side, takes slots.

    Args:
      tokens: ids int[B, C], or a TokenSet of embeddings, whose positions count from 0.
      kvs: the cache that `empty_cache`, `prefill`, `extend` or `decode` returned.
      valid: with ids, as in `embed`.
      room: given with the last chunk of a prompt, number of tokens that may be decoded: the cache
        plan, one of as many slots as the cache has, then cuts the cache. It may need keys and
        values of all tokens, and attention of the last ones, as far as they are in this chunk.
      logits: 'last' or 'all'.

    Returns:
      Logits float32[B, V] after the last real token of the chunk, or [B, C, V] after every one, and
      the cache.

    Raises:
      ValueError: tokens that do not fit, or beyond the room; a cache plan that needs more than the
        last chunk tells, or a cache that was cut before.
    """
    choices.check('logits=', logits, ('last', 'all'))
    odd = [f'{name}={value!r}' for name, value, usual in (
        ('mask', self.mask, 'causal'), ('full_layers', self.full_layers, ()),
        ('visual_stride', self.visual_stride, 0), ('frame_stride', self.frame_stride, 0),
        ('unmerging', self.unmerging, 'none')) if value != usual]
    if odd:
      raise ValueError(f'a model with {odd[0]} reads no chunks: give prefill the whole prompt')
    tokens = self._enter(tokens, valid, planned=False)
    kvs.check_room(tokens.slots)
    if any(kv.upkeep for kv in kvs.layers) and room is None:
      x, kvs = self._read_one_by_one(tokens, kvs)
      return self.logits(self.norm(_last(tokens, x) if logits == 'last' else x)), kvs
    needs, span = frozenset[str](), 0
    if room is not None:
      needs, span = self._check_last(tokens, kvs, room)
    (x, _, _), layers = self.stack.step((tokens.x, tokens, kvs.steps), kvs.layers, method='extend',
                                        recall=self._recall_kept(kvs), needs=needs, span=span)
    after, read = self._next_position(tokens), kvs.steps + tokens.slots
    kvs = kvs.replace(steps=read, layers=tuple(
        kv.with_start(kv.start + after - tokens.slots) for kv, _ in layers))
    if room is not None:
      ended = [self._end_prompt(layer, cast(KV, kv), signals, read, room)
               for layer, (kv, (_, signals)) in enumerate(zip(kvs.layers, layers, strict=True))]
      kvs = kvs.replace(layers=tuple(ended), steps=jnp.zeros((), jnp.int32))
    x = _last(tokens, x) if logits == 'last' else x
    return self.logits(self.norm(x)), kvs

  def probe(self, ids: Array, kvs: Cache, valid: Array | None = None, *,
            needs: frozenset[str]) -> tuple[tuple[LayerCache, Signals], ...]:
    """Reads a chunk of tokens behind a cache, and returns what each layer then holds and tells.

    Args:
      ids, kvs, valid: as in `extend`.
      needs: names of `Signals` fields, of all entries as keys and of the chunk's queries.

    Raises:
      ValueError: tokens that do not fit, or beyond the room.
    """
    tokens = self._enter(ids, valid, planned=False)
    kvs.check_room(tokens.slots)
    _, layers = self.stack.step((tokens.x, tokens, kvs.steps), kvs.layers, method='extend',
                                recall=self._recall_kept(kvs), needs=needs, span=0)
    return layers

  def _check_last(self, tokens: TokenSet, kvs: Cache, room: int) -> tuple[frozenset[str], int]:
    """Signals that the cache plan needs of the last chunk, and their span."""
    slots = {kv.filled + kv.room for kv in kvs.layers}
    if len(slots) > 1 or not all(isinstance(kv, KV) and kv.pos.ndim == 2 for kv in kvs.layers):
      raise ValueError('room= ends a prompt of chunks, and this cache was cut already: leave it '
                       'out')
    self._check_length(slots.pop(), room)
    if self.cache_plan is None:
      return frozenset(), 0
    only = self.cache_plan.only
    needs, span = cache_needs(only), only.method.span
    missing = sorted(needs - LAST_CHUNK)
    if missing:
      raise ValueError(f'{only.name} needs {", ".join(missing)} of the whole prompt, and the last '
                       f'chunk tells {", ".join(sorted(LAST_CHUNK))}: read the prompt in one')
    if span > tokens.slots:
      raise ValueError(f'{only.name} asks the last {span} tokens, and the last chunk has '
                       f'{tokens.slots} slots: make that chunk longer')
    return needs, span

  def _end_prompt(self, layer: int, kv: KV, signals: Signals, read: Array,
                  room: int) -> LayerCache:
    """A layer's cache when all chunks are read, cut by the cache plan."""
    filled = kv.filled + kv.room
    tokens = TokenSet.create(jnp.zeros((*kv.pos.shape, 1), self.dtype), pos=kv.pos, valid=kv.valid,
                             kind=jnp.full(kv.pos.shape, TEXT, jnp.int8), of=(TEXT,))
    kv = kv.replace(start=kv.start + read, filled=filled)
    return self._reduce_cache(kv, layer, tokens, signals).with_room(room)

  def _enter(self, tokens: Array | TokenSet, valid: Array | None, room: int = 0, *,
             planned: bool = True) -> TokenSet:
    """Tokens of embeddings that fit this model, and its plan where that is to act on them."""
    if not isinstance(tokens, TokenSet):
      tokens = self.embed(tokens, valid)
    elif valid is not None:
      raise ValueError('a TokenSet has its own mask: leave valid out, or give token ids')
    if tokens.x.shape[2] != self.width:
      raise ValueError(f'embeddings of width {tokens.x.shape[2]} do not fit this model of width '
                       f'{self.width}: project them first')
    length = tokens.slots if tokens.places is None else tokens.places.shape[1]
    self._check_length(length, room)
    if planned and self.plan and self.plan.slots not in (None, tokens.slots):
      raise ValueError(f'the plan is for prompts of {self.plan.slots} slots, not '
                       f'{tokens.slots}: make one with lm.host(slots)')
    for layer in tokens.added:
      if layer >= self.depth:
        raise ValueError(f'features cannot be added before layer {layer}: the layers are 0 to '
                         f'{self.depth - 1}')
    if tokens.added and self.plan and self.plan.positions == 'restart':
      raise ValueError(f"{self.plan.name} has the model run anew under positions='restart', where "
                       "features that are added have no place: set positions='keep'")
    if self.plan and self.plan.holds == 'last':
      tokens = tokens.replace(held=last_real(tokens))
    tokens = tokens.replace(x=tokens.x.astype(self.dtype))
    tokens = with_stats(tokens, self.mask, frames=bool(self.frame_stride))
    if self.unmerging != 'none' and tokens.places is None:
      tokens = tokens.replace(places=tokens.pos)
    if self.visual_stride and tokens.pos.ndim == 2:
      turned = v2pe_steps(tokens.kind == VISUAL, stride=self.visual_stride, valid=tokens.valid)
      tokens = tokens.replace(pos=jnp.stack([tokens.pos, turned], axis=2))
    if self.frame_stride and tokens.pos.ndim == 2:
      turned = tokens.pos + self.frame_stride * frames_begun(tokens.stats[FRAME])
      tokens = tokens.replace(pos=jnp.stack([tokens.pos, turned], axis=2))
    return tokens

  def _next_position(self, tokens: TokenSet) -> Array:
    """int32[B(, P)]: the position after the latest; with several numbers the others are all one
    more than the largest of them, from a whole one (Qwen2-VL, arXiv:2409.12191, Sec. 2.1)."""
    steps = self.rotation.steps
    real = tokens.real.reshape(tokens.real.shape + (1,) * (tokens.pos.ndim - 2))
    latest = jnp.max(jnp.where(real, tokens.pos, -steps), axis=1)
    if latest.ndim == 1:
      return latest + 1
    rotary = (-(-jnp.max(latest[:, 1:], axis=1, keepdims=True) // steps) + 1) * steps
    return jnp.concatenate([latest[:, :1] + 1, jnp.broadcast_to(rotary, latest[:, 1:].shape)],
                           axis=1)

  def _check_length(self, slots: int, room: int) -> None:
    if slots + room > self.context:
      raise ValueError(f'a prompt of {slots} slots and {room} tokens to come exceed the '
                       f'context of {self.context}: shorten the prompt, ask for fewer tokens, or '
                       'set context and RoPE scaling for more')

  def _restarted(self, tokens: TokenSet) -> TokenSet:
    """A new prompt of the original tokens that the last cut leaves, in their order, from 0."""
    if not self.plan or not self.plan.events:
      return tokens
    _, out = self.stack(tokens)
    last = self.plan.events[-1]
    reduced = out['cuts'][last.layer]
    if tokens.pos.ndim > 2:
      raise ValueError("positions='restart' has no meaning for positions of several numbers "
                       "(M-RoPE): choose 'keep'")
    count = last.slots_out
    left = (reduced.owner >= 0) & tokens.real
    position = jnp.where(left, tokens.pos, jnp.iinfo(jnp.int32).max)
    index = jnp.argsort(position, axis=1, stable=True)[:, :count]
    pos = jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32), index.shape)
    valid = None if tokens.valid is None else take(left, index)
    stats = {name: take(tokens.stats[name], index) for name in (FRAME,) if name in tokens.stats}
    return TokenSet.create(take(tokens.x, index), pos=pos, kind=take(tokens.kind, index),
                           valid=valid, stats=stats, of=tokens.of, texts=tokens.texts,
                           padding='last')

  def logits(self, x: Array) -> Array:
    """Returns float32[..., V] of features that `read` gave, or any that are normed."""
    if not self.tied:
      return self.head(x)
    table = jnp.asarray(self.table, self.dtype)
    return self._product(x.astype(self.dtype), table, (((x.ndim - 1,), (1,)), ((), ())))

  def _embedded(self, ids: Array) -> Array:
    """float[..., D] of ids int[...]."""
    table = self._constrain(jnp.asarray(self.table, self.dtype), 'tensor', None)
    return self._constrain(table[ids], BATCH_AXES)

  def _product(self, x: Array, weights: Array, dimensions: jax.lax.DotDimensionNumbers,
               **unused: object) -> Array:
    """Logits, not rounded to the dtype of the factors; `weights` are [D, V] or [V, D]."""
    del unused
    vocabulary = 1 - dimensions[0][1][0]
    axes = ('tensor' if d == vocabulary else None for d in (0, 1))
    weights = self._gather_weights(weights, *axes)
    logits = jax.lax.dot_general(x, weights, dimensions, preferred_element_type=jnp.float32)
    return self._constrain(logits, BATCH_AXES, *(None,) * (x.ndim - 2), 'tensor')

  def _constrain(self, x: Array, *axes: str | tuple[str, ...] | None) -> Array:
    """An array divided along these axes of the mesh, if there is one, and so its gradient."""
    if self.mesh is None:
      return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, PartitionSpec(*axes)))

  def _gather_weights(self, weights: Array, *axes: str | tuple[str, ...] | None) -> Array:
    """Parameters divided along these axes alone, for a product with rows or a lookup."""
    return gathered(weights, self.mesh, *axes)


def _last(tokens: TokenSet, x: Array) -> Array:
  """float[B, D], the features of each row's last real token in float[B, N, D]."""
  last = jnp.argmax(jnp.where(tokens.real, sequence_index(tokens.pos), -1), axis=1)
  return take(x, last[:, None])[:, 0]


def last_real(tokens: TokenSet) -> Array:
  """Marks the latest real token of each row, bool[B, N]."""
  place = jnp.where(tokens.real, sequence_index(tokens.pos), -1)
  return jnp.arange(tokens.slots)[None] == jnp.argmax(place, axis=1)[:, None]


def _starts(plan: Plan | None) -> tuple[int, ...]:
  """Layers in which the cache is cut otherwise than in the layer above."""
  if plan is None:
    return ()
  depth = plan.events[-1].layer + 2 if plan.events else 0

  def size(layer: int) -> list[tuple[int, ...]]:
    # A learned method has parameters of its own in every layer.
    return [(event.slots_in, event.slots_out, event.reduction.learned * layer)
            for event in plan.at(layer)]

  return tuple(layer for layer in range(1, depth) if size(layer) != size(layer - 1))
