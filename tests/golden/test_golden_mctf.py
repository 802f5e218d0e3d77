"""MCTF against the outputs of released code: exact indices, floats within 1e-5."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import golden_vit, mostly_long

from models.backbones.vit import Block
from models.blocks import add
from ops import tokens as tk
from ops.reducers.vision.mctf import MCTF
from ops.signals import Signals
from ops.tokens import SPECIAL, VISUAL, TokenSet

CLOSE = {'atol': 1e-5, 'rtol': 0}
DIRECTION = {1: 'both', 0: 'one'}
POOLING = {0: 'size', 1: 'attention', 2: 'max', 3: 'mean'}


def method(raw, case):
  return MCTF(tau_sim=float(raw[f'{case}_tau_sim']), tau_info=float(raw[f'{case}_tau_info']),
              tau_size=float(raw[f'{case}_tau_size']),
              direction=DIRECTION[int(raw[f'{case}_bidirection'])],
              pooling=POOLING[int(raw[f'{case}_pooling_type'])])


def tokens_of(x, size, protected):
  kind = np.where(np.arange(x.shape[1]) < protected, SPECIAL, VISUAL).astype(np.int8)
  return TokenSet.create(jnp.asarray(x), kind=jnp.tile(kind, (len(x), 1)), size=size,
                         protected=protected)


@functools.partial(jax.jit, static_argnums=(0, 4, 5))
def operate(reducer, x, attention, size, protected, keep):
  """The assignment, the reduced tokens and the fused map."""
  tokens = tokens_of(x, size, protected)
  signals = Signals(received_attention=jnp.asarray(attention).mean(axis=2))
  assignment = reducer(tokens, signals, num_slots=keep)
  return assignment, tk.reduce(tokens, assignment), tk.reduce_attention_map(assignment,
                                                                            jnp.asarray(attention))


def members(owner, slots):
  """[B, T] -> bool[B, M, T], which original tokens each slot holds."""
  return np.asarray(owner)[:, None, :] == np.arange(slots)[None, :, None]


@pytest.mark.parametrize('case', ['a', 'b', 'c', 'd', 'e'])
def test_op(case):
  raw = golden_vit.load('mctf')
  x, size, protected = (raw[f'{case}_{name}'] for name in ('x', 'size', 'num_protected'))
  slots, removed = x.shape[1], int(raw[f'{case}_r_effective'])
  assignment, reduced, attention = operate(method(raw, case), x, raw[f'{case}_attn'],
                                           size[..., 0], int(protected), slots - removed)
  np.testing.assert_array_equal(members(reduced.owner, slots - removed), raw[f'{case}_source'])
  np.testing.assert_allclose(reduced.x, raw[f'{case}_out'], **CLOSE)
  np.testing.assert_allclose(reduced.size, raw[f'{case}_out_size'][..., 0], **CLOSE)
  np.testing.assert_allclose(attention, raw[f'{case}_out_attn'], **CLOSE)

  # Who joined whom: even slots odd ones, then what is left of the odd slots even ones.
  owner, gone = np.asarray(reduced.owner), {k: raw.get(f'{case}_{k}') for k in (
      'unm_idx', 'src_idx', 'dst_idx', 'src_idx2', 'dst_idx2')}
  def ends(slots):
    return np.take_along_axis(owner, slots, axis=1)

  np.testing.assert_array_equal(ends(2 * gone['src_idx']), ends(2 * gone['dst_idx'] + 1))
  if gone['src_idx2'] is not None:
    left = np.take_along_axis(gone['unm_idx'], gone['dst_idx2'], axis=1)
    np.testing.assert_array_equal(ends(2 * gone['src_idx2'] + 1), ends(2 * left))

  # Who stood for whom: survivors of both sides, in the release's order and numbering.
  even = 2 * raw[f'{case}_unm_idx']
  side = f'{case}_unm_idx2'
  odd = 2 * raw[side] + 1 if side in raw else np.tile(np.arange(1, slots, 2), (len(x), 1))
  np.testing.assert_array_equal(assignment.src, np.concatenate([even, odd], axis=1))


def test_fewest_slots():
  """At most half of the free tokens go, and ten stay: the clamp of case d, and of small sets."""
  raw, reducer = golden_vit.load('mctf'), MCTF()
  assert 21 - reducer.min_slots(21, 1) == int(raw['d_r_effective'])
  assert [reducer.min_slots(slots, 0) for slots in (24, 12, 10, 4)] == [12, 10, 10, 4]


def loop(x, attention, groups, weight):
  """A plain reading of the release for one row and given groups: (features, map) of each group."""
  keys = np.stack([attention[:, :, group].sum(axis=2) for group in groups], axis=2)
  if weight is None:
    return (np.stack([x[group].max(axis=0) for group in groups]),
            np.stack([keys[:, group].max(axis=1) for group in groups], axis=1))
  share = [weight[group] / weight[group].sum() for group in groups]
  out = np.stack([s @ x[group] for s, group in zip(share, groups, strict=True)])
  rows = np.stack([np.einsum('n,hnk->hk', s, keys[:, group])
                   for s, group in zip(share, groups, strict=True)], axis=1)
  return out, rows


@pytest.mark.parametrize('pooling', mostly_long(['attention', 'size', 'mean', 'max']))
def test_pooling(pooling):
  """Every pooling, of features and of the map, against a loop over the groups."""
  raw = golden_vit.load('mctf')
  x, attn, size = raw['a_x'], raw['a_attn'], raw['a_size'][..., 0]
  _, reduced, attention = operate(MCTF(pooling=pooling), x, attn, size, 1, 19)
  received = attn.mean(axis=(1, 2))
  for row in range(len(x)):
    weight = {'attention': received[row] * size[row], 'size': size[row],
              'mean': np.ones_like(size[row]), 'max': None}[pooling]
    owner = np.asarray(reduced.owner[row])
    groups = [np.flatnonzero(owner == slot) for slot in range(19)]
    out, rows = loop(x[row], attn[row], groups, weight)
    np.testing.assert_allclose(reduced.x[row], out, **CLOSE)
    np.testing.assert_allclose(attention[row], rows, **CLOSE)


@pytest.mark.parametrize('off', ['tau_sim', 'tau_info', 'tau_size'])
def test_criteria(off):
  """The pair that one step merges is the best product of the criteria that are on."""
  raw = golden_vit.load('mctf')
  x, attn, size = raw['a_x'], raw['a_attn'], raw['a_size'][..., 0]
  tau = {'tau_sim': 1.0, 'tau_info': 2.0, 'tau_size': 3.0, off: 0.0}
  _, reduced, _ = operate(MCTF(direction='one', **tau), x, attn, size, 0, 24)
  for row in range(len(x)):
    unit = x[row] / np.linalg.norm(x[row], axis=1, keepdims=True)
    info, small = 1 / attn[row].mean(axis=(0, 1)), 1 / size[row]
    score = np.ones((25, 25))
    if tau['tau_sim']:
      score *= ((unit @ unit.T + 1) / 2) ** (1 / tau['tau_sim'])
    for name, value in (('tau_info', info), ('tau_size', small)):
      if tau[name]:
        score *= np.outer(value, value) ** (1 / tau[name])
    a, b = np.unravel_index(np.argmax(score[::2, 1::2]), (13, 12))
    owner = np.asarray(reduced.owner[row])
    same = np.flatnonzero(owner == owner[2 * a])
    assert set(same) == {2 * a, 2 * b + 1}


@pytest.mark.long
@pytest.mark.parametrize(('case', 'config'), [
    ('r8', {}),
    ('noosa', {'site': 'after'}),
])
def test_model(case, config):
  raw = golden_vit.load('mctf_vit')
  logits, out = golden_vit.run({'method': 'mctf', 'remove': 8, 'layers': (1, 2, 3), **config})
  for layer in range(golden_vit.DEPTH):
    golden_vit.close(out['hidden'][layer], raw[f'{case}_block{layer}'])
  np.testing.assert_allclose(logits, raw[f'{case}_logits'], **CLOSE)
  np.testing.assert_allclose(out['tokens'].size, raw[f'{case}_size'][..., 0], **CLOSE)
  np.testing.assert_array_equal(members(out['tokens'].owner, 41), raw[f'{case}_source'])


@pytest.mark.long
def test_precise_form():
  """Looking ahead merges what one-step-ahead attention merges, and then attends again."""
  raw = golden_vit.load('mctf_vit')
  _, out = golden_vit.run({'method': 'mctf', 'args': {'attention': 'next_received_attention'},
                           'site': 'before', 'remove': 8, 'layers': 1})
  _, ahead = golden_vit.run({'method': 'mctf', 'remove': 8, 'layers': 1})
  cut, same = out['cuts'][1], ahead['cuts'][1]
  np.testing.assert_array_equal(cut.owner, same.owner)
  np.testing.assert_allclose(cut.x, same.x, **CLOSE)
  np.testing.assert_array_equal(cut.size, same.size)
  np.testing.assert_allclose(ahead['hidden'][1], raw['r8_block1'], **CLOSE)
  weights = {'params': jax.tree.map(lambda leaf: leaf[1], golden_vit.params()['stack']['blocks'])}

  @jax.jit
  def plain(cut):
    block = Block(golden_vit.WIDTH, golden_vit.HEADS, 128, parent=None)
    change, _ = block.apply(weights, cut, needs=frozenset(), proportional=True, method='attend')
    attended = add(cut, change)
    return add(attended, block.apply(weights, attended, method='feed_forward')[0])

  np.testing.assert_allclose(out['hidden'][1], plain(cut).x, **CLOSE)
  assert np.abs(out['hidden'][1] - raw['r8_block1']).max() > 1e-3


@pytest.mark.parametrize(('field', 'value'), [
    ('direction', 'back'), ('pooling', 'sum'), ('attention', 'keys'), ('tau_info', -1.0)])
def test_bad_settings(field, value):
  with pytest.raises(ValueError, match=field):
    MCTF(**{field: value})
