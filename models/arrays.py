"""Reduces bare arrays by a named method, as a model does in one layer.

Axes: B batch, N slots now, M slots after, D features, H heads, d features a head, W last rows.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from models.plans.hosts import Host, limits_of
from models.plans.methods import branch_methods, make_method
from models.reduction import ask
from ops import choices, signals
from ops import tokens as tk
from ops.budgets import resolve
from ops.reducers.cache import CACHE_REDUCERS
from ops.reducers.insert import INSERTS
from ops.reducers.method import Method
from ops.signals import AXES, Signals
from ops.tokens import SPECIAL, VISUAL, TokenSet

Array = jax.Array


def reduce_arrays(x: Array | np.ndarray | TokenSet, method: str, *, keep: int | None = None,
                  keep_ratio: float | None = None, args: Mapping[str, Any] | None = None,
                  params: Mapping[str, Any] | None = None, protected: int = 0,
                  valid: Array | None = None, **values: Any) -> TokenSet:
  """Reduces tokens once by a named method.

  Args:
    x: float[B, N, D], features; or a TokenSet, for tokens of several kinds, with sizes, or with
      what an earlier reduction left.
    method: its name in `models.plan.methods`.
    keep: how many of the tokens that the method may touch stay; protected ones, and slots that the
      method adds (EViT's fused token), come on top, as in a config.
    keep_ratio: the share that stays instead, in (0, 1], rounded up.
    args: the method's own arguments by name, as `config.reduce.<place>.args`.
    params: parameters of a learned method, as a model has them under 'reducer_<layer>'.
    protected: leading tokens ([CLS] and its like) that stay as they are.
    valid: bool[B, N], False for padding, which is never kept before a real token; None for none.
    **values: the signals that the method reads, by name (`ops.signals.Signals`): keys=float[B, N,
      H, d], cls_attention=float[B, H, N], grid=(rows, columns) and so on. Others are not read.

  Returns:
    A TokenSet of M slots: `x` float[B, M, D], `owner` int32[B, N] (the slot that now holds each
    token, -1 where none does), `sizes` float32[B, M] (tokens that a slot stands for), `real`
    bool[B, M] and `pos`.

  Raises:
    ValueError: an unknown method, argument or signal; no budget or two; one that the method cannot
      meet; a signal that is missing or of another shape; a learned method without parameters.
  """
  if method in CACHE_REDUCERS:
    raise ValueError(f'{method} acts on a cache of keys and values, not on tokens: give it to a '
                     f"language model, as reduce={{'cache': {{'method': {method!r}, ...}}}}")
  if method in branch_methods() or method in INSERTS:
    does = 'brings tokens in' if method in INSERTS else 'runs a part of a layer on some tokens'
    raise ValueError(f'{method} {does}, and none leaves: give it to a model, as '
                     f"reduce={{'language': {{'method': {method!r}, ...}}}}")
  for name in values:
    choices.check_key('there is no signal ', name, signals.NAMES)
  chosen = make_method(method, args or {})
  if chosen.mode:
    raise ValueError(f'{method} with these args leaves padding in place of tokens: give it to a '
                     f"model, as reduce={{'language': {{'method': {method!r}, ...}}}}")
  tokens = _tokens(x, protected, valid)
  budget = {'keep': keep, 'keep_ratio': keep_ratio}
  if sum(value is not None for value in budget.values()) != 1:
    both = 'both' if keep is not None else 'none'
    raise ValueError(f'a reduction needs one budget, got {both}: give keep=... (how many tokens '
                     'stay) or keep_ratio=... (which share of them)')
  learned, watches = isinstance(chosen, nn.Module), hasattr(chosen, 'watch')
  if learned and params is None:
    raise ValueError(f'{method} is learned, and its parameters are missing: give params=..., as a '
                     'model trained with it has them under reducer_<layer>')
  needs = chosen.needs | (chosen.watch_needs if watches else frozenset())
  measured = _signals(method, needs, tokens, values)
  # One layer of one size: what a plan resolves for a whole model.
  host = Host(1, tokens.slots, tokens.protected, frozenset())
  cuts = resolve(budget, limits_of(chosen, host, tokens.protected))
  return _carry_out(chosen, tokens, measured, params if learned else None,
                    num_slots=cuts[0].slots_out if cuts else tokens.slots)


@functools.partial(jax.jit, static_argnames=('method', 'num_slots'))
def _carry_out(method: Method, tokens: TokenSet, measured: Signals,
               params: Mapping[str, Any] | None, *, num_slots: int) -> TokenSet:
  """Asks a method and does as it says, as one program."""
  if hasattr(method, 'watch'):
    tokens = tokens.replace(stats=tokens.stats | method.watch(tokens, measured))
  assignment, _ = ask(method, tokens, measured, params, num_slots=num_slots)
  return tk.reduce(tokens, assignment)


def _tokens(x: Array | np.ndarray | TokenSet, protected: int, valid: Array | None) -> TokenSet:
  """The tokens that are to be reduced: leading ones special, the others visual."""
  if isinstance(x, TokenSet):
    if protected or valid is not None:
      raise ValueError('x is a TokenSet, which says itself what is protected and what is padding: '
                       'leave protected and valid out')
    return x
  x = jnp.asarray(x)
  if x.ndim != 3 or not jnp.issubdtype(x.dtype, jnp.floating):
    raise ValueError(f'x of shape {x.shape} and type {x.dtype} is no batch of tokens: give '
                     'float[batch, tokens, features], or a TokenSet')
  batch, slots, _ = x.shape
  if not 0 <= protected < slots:
    raise ValueError(f'protected={protected} of {slots} tokens leaves nothing to reduce: give 0 to '
                     f'{slots - 1}')
  if valid is not None and np.shape(valid) != (batch, slots):
    raise ValueError(f'valid of shape {np.shape(valid)} does not fit x of shape {x.shape}: give '
                     f'bool[{batch}, {slots}]')
  leading = np.arange(slots) < protected
  kind = np.where(leading, SPECIAL, VISUAL).astype(np.int8)
  pos = np.where(leading, -1, np.arange(slots) - protected).astype(np.int32)
  return TokenSet.create(
      x, pos=jnp.broadcast_to(pos, (batch, slots)), kind=jnp.broadcast_to(kind, (batch, slots)),
      valid=None if valid is None else jnp.asarray(valid, bool), protected=protected)


def _signals(method: str, needs: frozenset[str], tokens: TokenSet,
             values: Mapping[str, Any]) -> Signals:
  """The signals that a method reads, checked against the tokens.

  Raises:
    ValueError: one is missing, or has another shape.
  """
  batch, slots = tokens.x.shape[:2]
  missing = [name for name in sorted(needs) if values.get(name) is None
             and getattr(Signals(), name) is None and name != 'slots']
  if missing:
    hints = ', '.join(
        f'{name}={"bool" if name.endswith("valid") else "float"}[{", ".join(AXES[name])}]'
        if name in AXES else f'{name}={"(rows, columns)" if name == "grid" else "..."}'
        for name in missing)
    raise ValueError(f'{method} reads {" and ".join(missing)}, not given here: give {hints} '
                     '(ops/signals.py says what each is)')
  arrays = {}
  for name in needs & AXES.keys():
    value, axes = jnp.asarray(values[name]), AXES[name]
    sizes = {'B': batch, 'N': slots}
    if value.ndim != len(axes) or any(sizes.get(axis, size) != size
                                      for axis, size in zip(axes, value.shape, strict=True)):
      wanted = ', '.join(str(sizes.get(axis, axis)) for axis in axes)
      raise ValueError(f'{name} of shape {value.shape} does not fit {batch} rows of {slots} '
                       f'tokens: give float[{wanted}]')
    arrays[name] = value
  static = {name: values[name] for name in signals.STATIC if values.get(name) is not None}
  if 'grid' in static:
    static['grid'] = tuple(static['grid'])
  return Signals().replace(**arrays, **({'slots': slots} | static))
