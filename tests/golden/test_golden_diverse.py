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
from ops.reducers.projector.holov import HoloV
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


@pytest.mark.parametrize('platform', ['cpu', 'cuda'])
def test_rows_of_unequal_counts_and_budgets(platform, trace_for):
  """As each alone, odd counts and such of more than half included, on CPU or all at once."""
  trace_for(platform)
  rng = np.random.default_rng(0)
  x, score = rng.normal(size=(4, 40, 6)).astype(np.float32), rng.uniform(size=(4, 40))
  among = np.arange(40)[None] < np.array([[40], [33], [7], [20]])
  keep = np.array([[9], [12], [5], [20]], np.int32)
  order = np.argsort(np.where(among, -score, 1), axis=1)
  # A function of its own, as compiled ones are remembered.
  found = jax.jit(lambda *args: drop_repeats(*args, keep=keep))(
      x, among, np.argsort(order, axis=1).astype(np.int32))
  for row in range(4):
    wanted = by_hand(x[row], order[row, :among[row].sum()], keep[row, 0])
    np.testing.assert_array_equal(np.flatnonzero(found[row]), wanted)


@pytest.mark.parametrize('case', [0, 1])
def test_holov_for_llava(case):
  raw = recorded.arrays(f'vlm_pre/holov_llava_case{case}')
  found = kept(HoloV(chunks=int(raw['num_crops'])), raw['features'],
               Signals(cls_attention=raw['attn'][:, None]), num_slots=int(raw['keep']))
  np.testing.assert_array_equal(found, raw['kept_indices_in_order'])


def test_holov_for_qwen():
  """The number of chunks follows from the counts; positions are those of the whole image."""
  raw = recorded.arrays('vlm_pre/holov_qwen_case0')
  told = Signals(received_attention=raw['attn'][None, None])
  found = np.asarray(kept(HoloV(by='received_attention'), raw['features'], told,
                          num_slots=len(raw['final_positions'])))[0]
  np.testing.assert_array_equal(found, raw['final_positions'])
  np.testing.assert_array_equal(raw['features'][0, found[found >= 0]],
                                raw['out_tokens'][0, :(found >= 0).sum()])


def test_holov_of_the_paper_gives_the_rest_to_others():
  """All attention is in one chunk of four: the release loses what that has no room for."""
  attention = np.full((2, 1, 20), 0.001, np.float32)
  attention[:, 0, 5:10] = 0.19
  attention[:, 0, 17] = 0.002
  told = Signals(cls_attention=attention)
  x = np.random.default_rng(0).normal(size=(2, 20, 8)).astype(np.float32)
  few, full = (np.asarray(kept(HoloV(chunks=4, variant=variant), x, told, num_slots=12))
               for variant in ('release', 'paper'))
  assert ((few >= 0).sum(axis=1) < 12).all()
  assert (full >= 0).all()
  for row in (*few, *full):
    assert {5, 6, 7, 8, 9} <= set(row.tolist())
  assert {17} <= set(full[0].tolist())
