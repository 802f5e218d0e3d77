"""CrossGET against the outputs of released code: exact indices, floats within 1e-5.

The golden outputs are those of a stable sort: a pair of mutual nearest tokens ties exactly, and an
unstable sort lets either go.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import contract, golden_vit, mostly_long

from ops import assignments
from ops import tokens as tk
from ops.reducers.vision.crossget import CrossGET
from ops.signals import Signals
from ops.tokens import SPECIAL, TEXT, VISUAL, TokenSet

CLOSE = {'atol': 1e-5, 'rtol': 0}


def case_of(name):
  """One case's arrays, sizes without their last axis."""
  raw = {key[len(name) + 1:]: value for key, value in golden_vit.load('crossget').items()
         if key.startswith(f'{name}_')}
  return raw | {key: value[..., 0] for key, value in raw.items() if key.endswith('size')}


@functools.partial(jax.jit, static_argnums=(0, 3))
def compiled(method, tokens, signals, num_slots):
  assignment = method(tokens, signals, num_slots=num_slots)
  mean = assignments.Merge.mean(assignment.src, assignment.dst, tokens.sizes)
  ids = mean.apply(tokens.stats['token_id']) if 'token_id' in tokens.stats else None
  return assignment, tk.reduce(tokens, assignment), mean, ids


def operate(method, raw, *, ends=(0, -1), free=VISUAL, **signals):
  """The assignment, the reduced tokens, the same merge at weight one, and ids merged so.

  Slots at `ends` are special.
  """
  x = raw['x']
  kind = np.full(x.shape[:2], free, np.int8)
  kind[:, list(ends)] = SPECIAL
  stats = {'token_id': raw['token_id']} if 'token_id' in raw else {}
  tokens = TokenSet.create(jnp.asarray(x), kind=kind, size=raw['size'], stats=stats,
                           protected=len(ends), of=(free,))
  keep = raw['stable_out'].shape[1]
  return golden_vit.arrays(compiled(method, tokens, Signals(**signals), keep))


def compare(reduced, raw):
  np.testing.assert_allclose(reduced.x, raw['stable_out'], **CLOSE)
  np.testing.assert_allclose(reduced.size, raw['stable_out_size'], **CLOSE)


def heads(rows, count=2):
  """float[B, N, F] -> [B, N, H, d], whose concatenation over heads it is."""
  return rows.reshape(*rows.shape[:2], count, -1)


@pytest.mark.parametrize('case', ['a', 'b', 'c'])
def test_image(case):
  raw = case_of(case)
  method = CrossGET(form='cross')
  slots, keep = raw['x'].shape[1], raw['stable_out'].shape[1]
  assert slots - keep == int(raw['r_effective'])
  assert method.min_slots(slots, 2) <= keep
  if int(raw['r']) > slots:
    assert method.min_slots(slots, 2) == keep
  assignment, reduced, mean, _ = operate(method, raw, keys=heads(raw['k']),
                                         queries=heads(raw['q']))
  compare(reduced, raw)
  # Who went, and where to, as the release lists them; its own sort gave the same in these cases.
  np.testing.assert_allclose(raw['out'], raw['stable_out'], **CLOSE)
  np.testing.assert_array_equal(assignment.src, np.sort(raw['dst_all_idx'], axis=1))
  target = np.take_along_axis(raw['dst_all_idx'], raw['dst_idx'], axis=1)
  joined = np.take_along_axis(assignment.dst, raw['src_idx'], axis=1)
  np.testing.assert_array_equal(np.take_along_axis(assignment.src, joined, axis=1), target)
  np.testing.assert_allclose(reduced.size, raw['out_size'], **CLOSE)
  # A source's weight beside that in a mean: twice its part of the pair's softmax, whose parts the
  # release lists source first.
  factor = np.take_along_axis(assignment.weight / mean.weight, raw['src_idx'], axis=1)
  np.testing.assert_allclose(factor / 2, raw['weight'][..., 0], **CLOSE)
  np.testing.assert_allclose(1 - factor / 2, raw['weight'][..., 1], **CLOSE)


def test_text():
  raw = case_of('t0')
  _, reduced, _, ids = operate(CrossGET(form='text'), raw, free=TEXT, keys=heads(raw['k']),
                               queries=heads(raw['q']))
  compare(reduced, raw)
  # Ids averaged as the release does: the same merge, every pair at weight one.
  np.testing.assert_allclose(ids, raw['stable_out_token_id'], rtol=1e-6)
  # The end of the text is found at the same slot in either.
  end = raw['stable_out_token_id'].argmax(axis=1)
  np.testing.assert_array_equal(np.argmax(reduced.stats['token_id'], axis=1), end)
  assert (reduced.kind[np.arange(len(end)), end] == TEXT).all()


def test_attention():
  raw = case_of('l0')
  # [keys, queries] in the release's layout; the last query is the cross token's.
  received, last = raw['query'].mean(axis=2), raw['query'][:, :, -1]
  # The golden keys are the mean over heads; two heads that have it.
  keys = np.stack([raw['k'] + raw['x'], raw['k'] - raw['x']], axis=2)
  _, reduced, *_ = operate(CrossGET(form='attention'), raw, keys=keys,
                           cls_attention=last[:, None], received_attention=received[:, None])
  compare(reduced, raw)


def test_image_form_reads_the_first_special_token():
  """With the cross token's query moved to the front, it gives what the cross form does."""
  raw = case_of('a')
  queries = raw['q'].copy()
  queries[:, 0] = queries[:, -1]
  moved, *_ = operate(CrossGET(), raw, keys=heads(raw['k']), queries=heads(queries))
  cross, *_ = operate(CrossGET(form='cross'), raw, keys=heads(raw['k']), queries=heads(raw['q']))
  np.testing.assert_array_equal(moved.dst, cross.dst)
  np.testing.assert_array_equal(moved.weight, cross.weight)


@pytest.mark.parametrize('form', mostly_long(['cross', 'text', 'attention']))
def test_padding_changes_nothing_in_other_forms(form):
  method, case = CrossGET(form=form), contract.random_case()
  keep = max(contract.KEEP, method.min_slots(contract.SLOTS, contract.PROTECTED))

  def run(case):
    tokens = case.tokens()
    ids = np.where(case.real, (7 * tokens.pos + 11) % 19, 1e3).astype(np.float32)
    tokens = tokens.replace(stats={'token_id': ids})
    return golden_vit.arrays(compiled(method, tokens, case.signals(method.needs), keep)[1])

  without = run(case)
  left, right = np.arange(contract.WIDE - contract.SLOTS, contract.WIDE), np.arange(contract.SLOTS)
  holes = np.setdiff1d(np.arange(contract.WIDE), [4, 5, 13])
  padded = run(contract.spread(case, [left, right, holes]))
  for row in range(contract.BATCH):
    real = padded.valid[row]
    np.testing.assert_allclose(padded.x[row][real], without.x[row], **CLOSE)
    np.testing.assert_array_equal(padded.pos[row][real], without.pos[row])
    np.testing.assert_allclose(padded.size[row][real], without.size[row], **CLOSE)


@pytest.mark.long
def test_errors():
  with pytest.raises(ValueError, match="form='word' is unknown: choose one of image, cross"):
    CrossGET(form='word')
  raw = case_of('a')
  signals = {'keys': heads(raw['k']), 'queries': heads(raw['q'])}
  with pytest.raises(ValueError, match='token_id'):
    operate(CrossGET(form='text'), raw, **signals)
  with pytest.raises(ValueError, match='special token, of which this host has none'):
    operate(CrossGET(), raw, ends=(), **signals)
