"""DyMU against released outputs: exact indices, floats within 1e-5."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import golden_vit, recorded

from ops import attention, unmerge
from ops import tokens as tk
from ops.primitives.match import find_threshold
from ops.reducers.vision.dymu import DyMU
from ops.signals import Signals
from ops.tokens import SPECIAL, VISUAL, TokenSet

CLOSE = {'atol': 1e-5, 'rtol': 0}


def load(name):
  return recorded.arrays(f'vlm_pre/dymu_{name}')


def prepare(raw):
  """Tokens and keys of a golden file."""
  x, special = raw['x'], int(raw['class_token'])
  kind = np.where(np.arange(x.shape[1]) < special, SPECIAL, VISUAL).astype(np.int8)
  size = raw['size'][..., 0] if 'size' in raw else None
  tokens = TokenSet.create(jnp.asarray(x), kind=np.tile(kind, (len(x), 1)), size=size,
                           protected=special)
  return tokens, raw['metric'][:, :, None]


@functools.partial(jax.jit, static_argnums=(0, 3))
def compiled(method, tokens, keys, num_slots):
  answer = method(tokens, Signals(keys=keys), num_slots=num_slots)
  reduced = tk.reduce(tokens, answer)
  return answer, reduced, tk.restore(reduced, reduced.x)


def run(method, tokens, keys, num_slots):
  """The assignment, the reduced tokens, and these at the places of the original ones."""
  return golden_vit.arrays(compiled(method, tokens, keys, num_slots))


def members(reduced, slots):
  """float[B, M, T]: 1 where a slot holds an original token."""
  return (np.asarray(reduced.owner)[:, None] == np.arange(slots)[None, :, None]).astype(np.float32)


@pytest.mark.parametrize('room', [0, 7])
@pytest.mark.parametrize('case', ['case0', 'case1'])
def test_one_image(case, room):
  raw = load(f'dtome_{case}')
  tokens, keys = prepare(raw)
  left = raw['out'].shape[1]
  answer, reduced, restored = run(DyMU(threshold=float(raw['threshold'])), tokens, keys,
                                  left + room)
  np.testing.assert_array_equal(reduced.valid, [np.arange(left + room) < left])
  np.testing.assert_array_equal(answer.wanted, [left])
  np.testing.assert_allclose(reduced.x[:, :left], raw['out'], **CLOSE)
  np.testing.assert_allclose(reduced.size[:, :left], raw['out_size'][..., 0], **CLOSE)
  np.testing.assert_array_equal(members(reduced, left), raw['out_pos_tracking'])
  np.testing.assert_allclose(restored, raw['repeated'], **CLOSE)


def same_sets(reduced, raw):
  """The release sorts padding away by an unstable sort, so slots are matched by what they hold.

  It divides by size + 1e-4, not size, in batches.
  """
  found = members(reduced, reduced.slots)
  for row, padding in enumerate(raw['padding_mask'] > 0.5):
    held = raw['out_pos_tracking'][row][~padding]
    order = [int(np.flatnonzero((found[row] == mine).all(1))[0]) for mine in held]
    assert sorted(order) == np.flatnonzero(reduced.valid[row]).tolist()
    size = raw['out_size'][row][~padding]
    np.testing.assert_array_equal(np.asarray(reduced.size)[row, order], size[:, 0])
    released = raw['out'][row][~padding] * (size + 1e-4) / size
    np.testing.assert_allclose(np.asarray(reduced.x)[row, order], released, **CLOSE)


def test_batch():
  raw = load('batch_threshold')
  tokens, keys = prepare(raw)
  _, reduced, _ = run(DyMU(threshold=float(raw['threshold'])), tokens, keys, 24)
  same_sets(reduced, raw)


def test_finding_the_threshold():
  raw = load('batch_find_threshold')
  tokens, keys = prepare(raw)
  threshold, lowest = jax.jit(lambda tokens, keys: [
      find_threshold(tokens, keys, remove=remove) for remove in (int(raw['r']), 99)])(tokens, keys)
  np.testing.assert_allclose(threshold, raw['batch_threshold'], atol=1e-6)
  # Compiled anew, the first pair that stays apart may come out a rounding error above itself.
  answer, reduced, _ = run(DyMU(threshold=float(threshold) + 1e-6), tokens, keys, 27)
  same_sets(reduced, raw)
  assert int(np.asarray(answer.wanted).sum()) == 3 * (33 - int(raw['r']))
  # More than half cannot go: the last candidate decides, and [CLS] is none.
  np.testing.assert_array_equal(lowest, 0.0)


def test_overflow_merges_the_next_most_similar():
  raw = load('dtome_case0')
  tokens, keys = prepare(raw)
  strict, full = (run(DyMU(threshold=t), tokens, keys, 40)[0] for t in (0.99, 0.0))
  np.testing.assert_array_equal(strict.wanted > 40, [True])
  assert strict.valid.all()
  assert int(full.wanted[0]) == int(full.valid.sum()) == 33
  loose = run(DyMU(threshold=float(raw['threshold']), most=25), tokens, keys, 50)[0]
  # Twenty-five pairs merge in both, by the limit here and by the capacity there.
  np.testing.assert_array_equal(loose.dst, strict.dst)


@pytest.mark.long
def test_a_model_reports_overflow():
  """Layer 1 may keep all but two tokens and merges none by itself; layer 2 merges what it can."""
  _, out = golden_vit.run({'method': 'dymu', 'args': {'threshold': (1.0, 1.0, -1.0, 1.0)},
                           'layers': (1, 2), 'keep': (62, 60)})
  np.testing.assert_array_equal(out['overflow'][1], [2, 2])
  np.testing.assert_array_equal(out['overflow'][2], [0, 0])
  assert out['cuts'][1].valid.all()
  np.testing.assert_array_equal(out['cuts'][2].valid.sum(1), [63 - 31, 63 - 31])


def test_a_threshold_for_each_layer():
  method = DyMU(threshold=(0.1, 0.2, 0.3))
  assert [method.threshold_at(layer, 3) for layer in range(3)] == [0.1, 0.2, 0.3]
  with pytest.raises(ValueError, match='3 thresholds do not fit 4 layers'):
    method.threshold_at(0, 4)
  with pytest.raises(ValueError, match='most=0'):
    DyMU(most=0)


def unmerge_case():
  raw = load('vtu_scores')
  q, k = (raw[name].swapaxes(1, 2) for name in ('Q_un', 'K_un'))
  owner = raw['mapping_indices'].astype(np.int32)[None]
  return raw, q, k, owner, raw['cos'], raw['sin']


def test_unmerged_scores():
  raw, q, k, owner, cos, sin = unmerge_case()
  found, unscaled = jax.jit(lambda *args: (
      unmerge.scores(*args), unmerge.scores(*args, scale=1.0)))(q, k, owner, cos, sin)
  np.testing.assert_allclose(found, raw['attn_scores'], **CLOSE)
  np.testing.assert_allclose(found, raw['attn_scores_expand_then_rope'], **CLOSE)
  np.testing.assert_allclose(unscaled, raw['attn_scores'] / raw['scaling'], rtol=0, atol=3e-5)


@pytest.mark.parametrize('causal', [True, False])
def test_unmerged_attention(causal):
  """From the released scores: softmax, values, and the mean over the tokens of each slot."""
  raw, q, k, _, cos, sin = unmerge_case()
  v = np.random.default_rng(0).normal(size=q.shape).astype(np.float32)
  index = raw['mapping_indices'].copy()
  index[3] = -1  # Dropped: no query of its own, and no key for the others.
  logits = raw['attn_scores'].astype(np.float64)
  logits[..., index < 0] = -np.inf
  if causal:
    logits += np.where(np.tri(12) > 0, 0, -np.inf)
  weights = np.exp(logits - logits.max(-1, keepdims=True))
  weights /= weights.sum(-1, keepdims=True)
  full = np.einsum('bhnm,bmhd->bnhd', weights, v[:, index])
  wanted = np.stack([full[:, index == slot].mean(1) if (index == slot).any()
                     else np.zeros_like(full[:, 0]) for slot in range(7)], axis=1)
  found = jax.jit(functools.partial(
      unmerge.attend, turn=functools.partial(unmerge.rotate, cos=cos, sin=sin),
      mix=lambda q, k, v, bias: attention.attend(q, k, v, bias=bias, causal=causal)))(
          q, k, v, index[None])
  np.testing.assert_allclose(found, wanted, **CLOSE)


def test_nothing_merged_is_ordinary_attention():
  rng = np.random.default_rng(1)
  x = rng.normal(size=(2, 9, 3, 4)).astype(np.float32)
  owner = np.tile(np.arange(9, dtype=np.int32), (2, 1))
  copied, mean = jax.jit(lambda x, owner: (
      unmerge.expand(x, owner), unmerge.collapse(x, owner, slots=9)))(x, owner)
  np.testing.assert_array_equal(copied, x)
  np.testing.assert_allclose(mean, x, rtol=0, atol=0)
