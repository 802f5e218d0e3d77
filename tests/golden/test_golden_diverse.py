"""Methods that keep attended tokens and diverse ones against released code: exact indices.

Axes: B batch, N patches, D features.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import recorded

from ops.primitives.dedup import drop_repeats
from ops.reducers.projector.vispruner import VisPruner
from ops.signals import Signals
from ops.tokens import TokenSet


@functools.partial(jax.jit, static_argnums=0, static_argnames='num_slots')
def kept(method, x, told, *, num_slots, **fields):
  """int[B, M], the slots that stay, -1 where fewer do."""
  answer = method(TokenSet.create(x, **fields), told, num_slots=num_slots)
  return answer.src if answer.valid is None else jnp.where(answer.valid, answer.src, -1)


@pytest.mark.parametrize('case', [0, 1])
def test_vispruner(case):
  raw = recorded.arrays(f'vlm_pre/vispruner_case{case}')
  method = VisPruner(important=float(raw['important_ratio']))
  found = kept(method, raw['features'], Signals(cls_attention=raw['cls_attn']),
               num_slots=int(raw['keep']))
  np.testing.assert_array_equal(found, raw['kept_indices'])


def by_hand(x, order, keep):
  """The rounds in numpy: the slots of `order` that are left."""
  x = x / np.linalg.norm(x, axis=1, keepdims=True)
  while len(order) > keep:
    even, odd = order[::2], order[1::2]
    most = (x[even] @ x[odd].T).max(axis=1, initial=-2)
    even = even[np.argsort(-most, kind='stable')]
    order = np.concatenate([even[min(8, len(order) - keep, len(even)):], odd])
  return np.sort(order)


def test_rows_of_unequal_counts_and_budgets():
  """As each alone, odd counts and such of more than half included."""
  rng = np.random.default_rng(0)
  x, score = rng.normal(size=(4, 40, 6)).astype(np.float32), rng.uniform(size=(4, 40))
  among = np.arange(40)[None] < np.array([[40], [33], [7], [20]])
  keep = np.array([[9], [12], [5], [20]], np.int32)
  order = np.argsort(np.where(among, -score, 1), axis=1)
  found = jax.jit(drop_repeats)(x, among, np.argsort(order, axis=1).astype(np.int32), keep=keep)
  for row in range(4):
    wanted = by_hand(x[row], order[row, :among[row].sum()], keep[row, 0])
    np.testing.assert_array_equal(np.flatnonzero(found[row]), wanted)
