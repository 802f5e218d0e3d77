"""DTEM against the outputs of released code: exact order, floats within 1e-5."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import golden_vit

from models.compressors.dtem import DTEM, relaxed_choice, soft_merge
from models.plan import make_plan
from ops import tokens as tk
from ops.signals import Signals
from ops.tokens import SPECIAL, VISUAL, TokenSet

CLOSE = {'atol': 1e-5, 'rtol': 0}
# Slots of less than this are empty: their order is rounding noise.
EMPTY = 1e-4


def case_of(name):
  return {key[len(name) + 1:]: value for key, value in golden_vit.load('dtem').items()
          if key.startswith(f'{name}_')}


def settings(raw):
  return {'candidates': int(raw['k2']), 'temperature': float(raw['tau1']),
          'choice_temperature': float(raw['tau2'])}


def with_cls(x, size):
  kind = np.where(np.arange(x.shape[1]) < 1, SPECIAL, VISUAL).astype(np.int8)
  return TokenSet.create(jnp.asarray(x), kind=np.tile(kind, (len(x), 1)), size=size, protected=1)


@functools.partial(jax.jit, static_argnums=0, static_argnames='num_slots')
def operate(module, x, size, metric, *, num_slots, **apply):
  """The assignment on a metric, of which the linear map changes nothing, and what it makes."""
  params = {'metric': {'kernel': jnp.eye(metric.shape[2]), 'bias': jnp.zeros(metric.shape[2])}}
  tokens = with_cls(x, size)
  answer = module.apply({'params': params}, tokens, Signals(hidden=metric), num_slots=num_slots,
                        **apply)
  return answer, tk.reduce(tokens, answer)


@functools.cache
def training(case):
  """The training answer of the module, on the golden metric."""
  raw = case_of(case)
  module = DTEM(features=raw['metric'].shape[-1], **settings(raw))
  return operate(module, raw['x'], raw['size'], raw['metric'], rngs={'dropout': jax.random.key(0)},
                 num_slots=raw['x'].shape[1] - int(raw['r']))


choice = jax.jit(relaxed_choice, static_argnames=(
    'most', 'candidates', 'temperature', 'choice_temperature'))


@functools.partial(jax.jit, static_argnames=(
    'num_slots', 'count', 'candidates', 'temperature', 'choice_temperature'))
def merged(tokens, metric, **how):
  return tk.reduce(tokens, soft_merge(tokens, metric, **how))


@pytest.mark.parametrize('case', ['a', 'b'])
def test_choice(case):
  raw = case_of(case)
  scores, picks = raw['scores'], int(raw['select_k'])
  found = choice(scores, np.ones(scores.shape, bool), np.full((len(scores), 1), picks),
                 most=picks, **settings(raw))
  np.testing.assert_allclose(found, raw['assign'], **CLOSE)


def test_warm_choice():
  """A plain reading of the rule where every candidate counts, for pairs that may not all merge."""
  rng = np.random.default_rng(3)
  scores, among = rng.normal(size=(2, 5, 4)), rng.random((2, 5, 4)) < 0.7
  among[:, 2] = False
  picks, candidates, temperature, choice_temperature = np.array([[3], [1]]), 2, 0.7, 1.6
  expected = np.zeros(scores.shape)
  for row in range(2):
    pairs = [(a, c) for a in range(5) for c in sorted(
        np.flatnonzero(among[row, a]), key=lambda c, a=a, row=row: -scores[row, a, c])[:candidates]]
    logits = {pair: scores[row][pair] / temperature for pair in pairs}
    for _ in range(picks[row, 0]):
      weight = {pair: np.exp(logits[pair] / choice_temperature) for pair in pairs}
      share = {pair: weight[pair] / sum(weight.values()) for pair in pairs}
      for pair in pairs:
        expected[row][pair] += share[pair]
        logits[pair] += np.log(1 - sum(share[other] for other in pairs if other[0] == pair[0]))
  expected /= np.maximum(expected.sum(axis=2, keepdims=True), 1)
  found = choice(
      scores.astype(np.float32), among, picks, most=4, candidates=candidates,
      temperature=temperature, choice_temperature=choice_temperature)
  np.testing.assert_allclose(found, expected, **CLOSE)


@pytest.mark.parametrize('case', ['a', 'b'])
def test_training(case):
  raw = case_of(case)
  _, reduced = golden_vit.arrays(training(case))
  assert reduced.slots == raw['x'].shape[1]
  assert int(raw['n_out']) == reduced.slots - int(raw['r'])
  np.testing.assert_allclose(reduced.size, raw['out_size'], **CLOSE)
  np.testing.assert_allclose(reduced.size.sum(axis=1), raw['size'].sum(axis=1), rtol=1e-5)
  for row in range(len(raw['x'])):
    full = raw['out_size'][row] > EMPTY
    assert full.sum() >= int(raw['n_out'])
    np.testing.assert_allclose(reduced.x[row][full], raw['out'][row][full], **CLOSE)
    ours, theirs = (x[row][~full][np.lexsort(x[row][~full].T)]
                    for x in (reduced.x, raw['out']))
    np.testing.assert_allclose(ours, theirs, **CLOSE)


def test_evaluation_merges_the_best_pairs():
  """The hard form of the choice on the golden scores: each token's best, the best three of all."""
  raw = case_of('a')
  scores = raw['scores'] / 100
  rows, count = scores.shape[1], scores.shape[2]
  keep = 1 + rows + count - int(raw['select_k'])
  # Unit vectors whose products are these scores: even slots beside [CLS] against odd ones.
  metric = np.zeros((2, 1 + rows + count, rows + count), np.float32)
  for row in range(2):
    gram = np.block([[np.eye(rows), scores[row]], [scores[row].T, np.eye(count)]])
    root = np.linalg.cholesky(gram)
    metric[row, 2:2 * rows + 1:2], metric[row, 1:2 * count:2] = root[:rows], root[rows:]
  _, reduced = operate(DTEM(features=rows + count), metric, None, metric, num_slots=keep)
  joined = np.asarray(reduced.owner)
  for row in range(2):
    best = np.argsort(-scores[row].max(axis=1))[:3]
    expected = np.arange(1 + rows + count)
    expected[2 + 2 * best] = 1 + 2 * scores[row].argmax(axis=1)[best]
    np.testing.assert_array_equal(joined[row][:, None] == joined[row][None],
                                  expected[:, None] == expected[None])


def test_a_sharp_choice_is_the_hard_merge():
  """At low temperatures the soft merge moves whole tokens, and empties as many slots."""
  rng = np.random.default_rng(0)
  x, metric = rng.normal(size=(2, 2, 15, 6)).astype(np.float32)
  merge = functools.partial(merged, num_slots=11, count=15, candidates=3, temperature=0.2,
                            choice_temperature=1e-4)
  reduced = golden_vit.arrays(merge(with_cls(x, None), metric))
  np.testing.assert_allclose(reduced.size, np.round(reduced.size), atol=1e-5)
  assert (np.sum(reduced.size > 0.5, axis=1) == 11).all()
  members = reduced.owner[:, None] == np.arange(15)[None, :, None]
  np.testing.assert_array_equal(members.sum(axis=2), np.round(reduced.size))
  means = np.einsum('bmn,bnd->bmd', members / np.maximum(members.sum(2, keepdims=True), 1), x)
  np.testing.assert_allclose(reduced.x[:, :11], means[:, :11], **CLOSE)


def test_only_the_first_count_slots_take_part():
  """As in the release's later layers: what an earlier cut emptied stays as it is, at the end."""
  raw = case_of('a')
  x, size, metric = raw['x'], raw['size'], raw['metric']
  merge = functools.partial(merged, num_slots=9, count=12, **settings(raw))
  alone = merge(with_cls(x[:, :12], size[:, :12]), metric[:, :12])
  reduced = golden_vit.arrays(merge(with_cls(x, size), metric))
  np.testing.assert_array_equal(reduced.x[:, 12:], x[:, 12:])
  np.testing.assert_array_equal(reduced.size[:, 12:], size[:, 12:])
  np.testing.assert_allclose(reduced.size[:, :12], alone.size, **CLOSE)
  np.testing.assert_allclose(reduced.x[:, :12], alone.x, **CLOSE)


def test_padding_changes_nothing_in_training():
  raw = case_of('b')
  x, size, metric = raw['x'], raw['size'], raw['metric']
  slots, extra = x.shape[1], 3
  merge = functools.partial(merged, num_slots=slots - 6, **settings(raw))
  plain = merge(with_cls(x, size), metric, count=slots)
  for place in (np.arange(slots), np.arange(extra, slots + extra),
                np.setdiff1d(np.arange(slots + extra), [3, 4, 9])):
    def spread(values, fill, place=place):
      out = np.full((2, slots + extra, *values.shape[2:]), fill, values.dtype)
      out[:, place] = values
      return out
    kind = np.where(np.arange(slots) < 1, SPECIAL, VISUAL).astype(np.int8)
    valid = spread(np.ones(x.shape[:2], bool), False)
    tokens = TokenSet.create(
        jnp.asarray(spread(x, 1e3)), kind=spread(np.tile(kind, (2, 1)), VISUAL),
        size=spread(size, 1e3), protected=1, valid=valid)
    reduced = golden_vit.arrays(merge(tokens, spread(metric, 1e3), count=slots + extra))
    np.testing.assert_array_equal(reduced.valid,
                                  np.tile(np.arange(slots + extra) < slots, (2, 1)))
    np.testing.assert_allclose(reduced.x[:, :slots], plain.x, **CLOSE)
    np.testing.assert_allclose(reduced.size[:, :slots], plain.size, **CLOSE)


def test_the_metric_learns_and_the_model_below_does_not():
  raw = case_of('b')
  tokens, width = with_cls(raw['x'], raw['size']), raw['metric'].shape[-1]
  module = DTEM(features=width)

  def loss(params, hidden):
    answer = module.apply({'params': params}, tokens, Signals(hidden=hidden), num_slots=14,
                          rngs={'dropout': jax.random.key(0)})
    reduced = tk.reduce(tokens, answer)
    return jnp.sum(reduced.x[:, 1] * reduced.size[:, 1:2])

  params = {'metric': {'kernel': 0.3 * np.eye(width, dtype=np.float32),
                       'bias': np.zeros(width, np.float32)}}
  learned, below = golden_vit.arrays(
      jax.jit(jax.grad(loss, argnums=(0, 1)))(params, raw['metric']))
  assert np.abs(learned['metric']['kernel']).max() > 1e-3
  np.testing.assert_array_equal(below, np.zeros_like(below))


def test_soft_sizes_do_not_compose():
  """A product of weights says nothing about sizes that go elsewhere than features do."""
  mix, _ = training('a')
  tokens = with_cls(case_of('a')['x'], None)
  with pytest.raises(ValueError, match='apply them one by one'):
    jax.eval_shape(lambda: tk.compose(tk.identity(tokens), mix))


@pytest.mark.long
def test_model_trains_on_all_slots_and_evaluates_on_fewer():
  model = golden_vit.model()
  plan = make_plan({'method': 'dtem', 'args': {'features': 16}, 'remove': 8, 'layers': (1, 2)},
                   model.host)
  model, slots = model.clone(plan=plan), model.host.slots
  images = golden_vit.images()
  made = jax.jit(model.init)(jax.random.key(0), images)['params']['stack']
  params = dict(golden_vit.params())
  params['stack'] = made | params['stack']

  def loss(params):
    logits, out = jax.jit(model.apply)({'params': params}, images,
                                       rngs={'dropout': jax.random.key(1)})
    return jnp.sum(logits ** 2), [out['cuts'][layer] for layer in (1, 2)]

  grads, cuts = jax.jit(jax.grad(loss, has_aux=True))(params)
  for cut, part in zip(cuts, (slots, slots - 8), strict=True):
    assert cut.slots == slots
    np.testing.assert_allclose(cut.size.sum(axis=1), [slots, slots], rtol=1e-5)
    assert (np.diff(np.asarray(cut.size)[:, 1:part], axis=1) <= 0).all()
  for path, leaf in jax.tree.leaves_with_path(grads):
    assert jnp.isfinite(leaf).all(), jax.tree_util.keystr(path)
  for layer in (1, 2):
    assert jnp.any(grads['stack'][f'reducer_{layer:02d}']['metric']['kernel'] != 0)
  _, out = jax.eval_shape(model.apply, {'params': params}, images)
  assert [out['cuts'][layer].slots for layer in (1, 2)] == [slots - 8, slots - 16]
