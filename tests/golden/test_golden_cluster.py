"""DPC-KNN, CTM and K-medoids against the outputs of released code: exact indices, floats 1e-5."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import golden_vit
from helpers.golden_vit import arrays

from models.plan import make_plan
from ops.primitives import cluster
from ops.primitives.cluster import average_clusters, density_clusters
from ops.primitives.select import top
from ops.reducers.vision.kmedoids import KMedoids
from ops.signals import Signals
from ops.tokens import TokenSet

CLOSE = {'atol': 1e-5, 'rtol': 0}
LAYERS = (1, 2)


@functools.partial(jax.jit, static_argnames=('num_slots', 'neighbours'))
def density(tokens, noise, weight, **settings):
  """Centres, groups, weights within them, and two ways to merge them."""
  src, dst = density_clusters(tokens, noise=noise, **settings)
  merge = average_clusters(tokens, src, dst, weight, smoothing=1e-6)
  equal = average_clusters(tokens, src, dst, tokens.real, smoothing=1e-6)
  return src, dst, merge.weight, merge.apply(tokens.x), equal.apply(tokens.x)


@jax.jit
def groups_of(x, centres):
  return cluster.nearest(cluster.distances(x), centres, jnp.ones(centres.shape, bool))


@functools.partial(jax.jit, static_argnums=(0, 3))
def medoids(method, x, received, keep):
  answer = method(TokenSet.create(x), Signals(received_attention=received), num_slots=keep)
  return answer.src, answer.apply(x)


@pytest.mark.parametrize('case', ['a', 'b', 'c'])
def test_dpcknn_op(case):
  raw = golden_vit.load('dpcknn')
  x, keep = raw[f'{case}_x'], int(raw[f'{case}_cluster_num'])
  mask = raw.get(f'{case}_token_mask')
  valid = None if mask is None else mask > 0
  tokens = TokenSet.create(jnp.asarray(x), valid=valid)
  src, dst, share, *merged = arrays(density(
      tokens, raw[f'{case}_noise'], raw[f'{case}_token_weight'][..., 0], num_slots=keep,
      neighbours=int(raw[f'{case}_k'])))
  np.testing.assert_array_equal(src, raw[f'{case}_centers'])
  real = np.ones(x.shape[:2], bool) if valid is None else valid
  np.testing.assert_array_equal(dst[real], raw[f'{case}_idx_cluster'][real])
  assert (dst[~real] == keep).all()

  # The release adds padding to the first cluster all the same; the others compare.
  first = 0 if valid is None else 1
  # Which group a token went to, and its share of it.
  np.testing.assert_array_equal(dst[real], raw[f'{case}_idx_token'][real])
  alone = real & (dst >= first)
  np.testing.assert_allclose(share[alone], raw[f'{case}_agg_weight'][..., 0][alone], **CLOSE)
  for name, found in zip(('merged', 'merged_equal'), merged, strict=True):
    np.testing.assert_allclose(found[:, first:], raw[f'{case}_{name}'][:, first:], **CLOSE)


def run(config, reducers=None):
  """The tiny ViT with 0.7 and 0.49 of its patches from layers 1 and 2 on."""
  params = dict(golden_vit.params())
  params['stack'] = {**params['stack'], **(reducers or {})}
  return golden_vit.run({'layers': LAYERS, 'keep_ratio': 0.7, 'ratio_of': 'start',
                         'rounding': 'floor', **config}, params)


def compare(raw, case, logits, out):
  for layer in range(golden_vit.DEPTH):
    golden_vit.close(out['hidden'][layer], raw[f'{case}_Features_block{layer}'])
  np.testing.assert_allclose(logits, raw[f'{case}_logits'], **CLOSE)


@pytest.mark.long
@pytest.mark.parametrize(('case', 'method'), [('k70eq', 'dpcknn'), ('k70', 'ctm')])
def test_dpcknn_model(case, method):
  """Features of all layers, logits, centres and groups."""
  raw = golden_vit.load('dpcknn')
  reducers = {}
  if method == 'ctm':
    for i, layer in enumerate(LAYERS):
      name = f'param_cluster_layers.{i}.score'
      reducers[f'reducer_{layer:02d}'] = {
          'score': {'kernel': raw[f'{name}.weight'].T, 'bias': raw[f'{name}.bias']}}
  logits, out = run({'method': method, 'args': {'smoothing': 1e-6}}, reducers)
  compare(raw, case, logits, out)
  # Kept_Tokens and Assignment_Maps number patches, cut by cut: slots without [CLS].
  owner = np.asarray(out['cuts'][1].owner)[:, 1:] - 1
  np.testing.assert_array_equal(owner, raw[f'{case}_Assignment_Maps_block1'])
  pos = np.asarray(out['cuts'][1].pos)[:, 1:]
  np.testing.assert_array_equal(pos, raw[f'{case}_Kept_Tokens_block1'])
  centres = raw[f'{case}_Kept_Tokens_block2']
  np.testing.assert_array_equal(np.asarray(out['cuts'][2].pos)[:, 1:],
                                np.take_along_axis(pos, centres, axis=1))
  joined = np.take_along_axis(raw[f'{case}_Assignment_Maps_block2'], owner, axis=1)
  np.testing.assert_array_equal(np.asarray(out['cuts'][2].owner)[:, 1:] - 1, joined)


def test_density_of_features_far_apart():
  """Densities that underflow as numbers still rank: the closest pair holds the best centre."""
  x = np.array([[0.0, 1e3, 2e3, 3.1e3, 3.15e3]], np.float32)[..., None]
  scores = jax.jit(lambda x: cluster.peaks(cluster.distances(x), jnp.ones((1, 5), bool),
                                           neighbours=2))(x)
  assert np.isfinite(np.asarray(scores)).all()
  assert int(np.argmax(scores)) == 3


@pytest.mark.parametrize('case', ['a', 'b'])
@pytest.mark.parametrize('weights', ['attention', 'equal'])
def test_kmedoids_op(case, weights):
  raw = golden_vit.load('kmedoids')
  x, keep, iterations = raw[f'{case}_x'], int(raw[f'{case}_K']), 3
  assert iterations == int(raw[f'{case}_iters'])
  received, start = None, 0
  prefix = case if weights == 'attention' else f'{case}_eq'
  if weights == 'attention':
    received = raw[f'{case}_token_weight'][..., 0][:, None]
  else:
    start = int(raw[f'{case}_eq_init'][0])
  method = KMedoids(weights=weights, start=start, iterations=iterations)
  src, centres = medoids(method, x, received, keep)
  np.testing.assert_array_equal(src, raw[f'{prefix}_center_idx'])
  np.testing.assert_allclose(centres, raw[f'{prefix}_centers'], **CLOSE)
  np.testing.assert_array_equal(groups_of(x, src), raw[f'{prefix}_assign'])


@pytest.mark.long
def test_kmedoids_model():
  raw = golden_vit.load('kmedoids')
  logits, out = run({'method': 'kmedoids'})
  compare(raw, 'k70', logits, out)
  pos = np.asarray(out['cuts'][1].pos)[:, 1:]
  np.testing.assert_array_equal(pos, raw['k70_Kept_Tokens_block1'])
  np.testing.assert_array_equal(np.asarray(out['cuts'][2].pos)[:, 1:], np.take_along_axis(
      pos, raw['k70_Kept_Tokens_block2'], axis=1))
  # Which medoid a token was nearest to; only the medoids stay.
  for layer in LAYERS:
    before = out['before'][layer].x[:, 1:]
    groups = groups_of(before, raw[f'k70_Kept_Tokens_block{layer}'])
    np.testing.assert_array_equal(groups, raw[f'k70_Assignment_Maps_block{layer}'])


def test_farthest_first_visits_each_slot_once():
  x = np.array([[0.0, 0.0, 1.0, 5.0, 9.0]], np.float32)[..., None]
  among = np.array([[True, True, False, True, True]])

  @jax.jit
  def visit(x, among):
    scores = cluster.farthest_first(cluster.distances(x), among, start=1, count=5)
    return scores, top(scores, 4)

  scores, order = arrays(visit(x, among))
  # From slot 1: the far end; then the other end (9 from slot 4); then slot 3; slot 2 never.
  np.testing.assert_array_equal(order, [[1, 4, 0, 3]])
  assert scores[0, 2] == scores.min()


def test_kmedoids_picks_no_token_twice():
  x, received = np.ones((1, 6, 2), np.float32), np.ones((1, 2, 6), np.float32)
  for weights in ('attention', 'equal'):
    src, _ = medoids(KMedoids(weights=weights), x, received, 4)
    assert src.tolist() == [[0, 1, 2, 3]]


def test_bad_weights():
  with pytest.raises(ValueError, match='choose one of attention, equal'):
    KMedoids(weights='size')
  plan = make_plan({'method': 'kmedoids', 'args': {'weights': 'equal'}, 'keep': 9, 'layers': 0},
                   golden_vit.model().host)
  assert not plan.only.method.needs
