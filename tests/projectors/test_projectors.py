"""Projectors that compress: what holds of each by itself, whatever its parameters are.

Axes: B batch, N patches, M tokens that are left, W width of the tower, D of the language model, T
ids of a prompt.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import mostly_long

from models.checkpoints.compressors import shapes_of
from models.checkpoints.layout import nest
from models.projectors import PROJECTORS
from models.projectors.base import LEVELS, Beside
from models.projectors.matryoshka import Matryoshka
from models.projectors.mqt import KEYS, MQT
from models.projectors.quecc import QueCC
from models.projectors.slime import Gates, SliME, SliMELocal
from models.projectors.slime_router import Asked, SliMERouter
from models.projectors.tokenflex import TokenFLEX
from ops.primitives import grids
from ops.tokens import TokenSet

BATCH, GRID, WIDTH, OUT = 2, (4, 4), 8, 12
# Behind a colon stands what is set otherwise where a projector has two programs.
CASES = {
    'tokenflex': {'side': 3, 'hidden': 5},
    'quecc': {'side': 2, 'heads': 2, 'levels': (0, 1)},
    'slime_local': {'side': 3, 'heads': 2, 'inner': 4},
    'mqt': {'queries': 4, 'count': 3, 'heads': 2},
    'mqt:content': {'queries': 4, 'count': 3, 'heads': 2, 'keys': 'content'},
    'matryoshka': {'side': 2},
    'slime': {'heads': 2},
}


def make(case, **others):
  return PROJECTORS[case.split(':')[0]](OUT, **CASES[case], **others)


@functools.cache
def inputs(module):
  """Parameters of a module, features, and what else it may read; all of them random."""
  rng = np.random.default_rng(0)

  def draw(*shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)

  params = nest({path: 0.5 * draw(*shape) for path, shape in
                 shapes_of(module, GRID, WIDTH).items()})
  patches = BATCH, math.prod(GRID), WIDTH
  levels = tuple(draw(*patches) for _ in getattr(module, LEVELS, ()))
  return params, draw(*patches), Beside(GRID, levels, question=draw(BATCH, OUT))


@functools.partial(jax.jit, static_argnums=0)
def compress(module, params, x, beside):
  return module.apply({'params': params}, TokenSet.create(x), beside).x


@functools.partial(jax.jit, static_argnums=0)
def gradients(module, params, x, beside):
  """Output, and gradients of all inputs."""

  def loss(params, x, beside):
    out = compress(module, params, x, beside)
    return jnp.sum(jnp.sin(out)), out

  (_, out), found = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(params, x, beside)
  return out, found


@pytest.mark.parametrize('case', mostly_long(CASES, short=4))
def test_as_many_tokens_as_said_each_row_by_itself_and_finite_gradients(case):
  module = make(case)
  params, x, beside = inputs(module)
  out, found = gradients(module, params, x, beside)
  after = module.grid_after(GRID)
  assert out.shape == (BATCH, module.slots(GRID), OUT)
  assert after is None or math.prod(after) == module.slots(GRID)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
  assert np.abs(found[1]).min() > 0, 'some feature of a patch counts for nothing'
  last = jax.tree.map(lambda leaf: leaf[1:], beside)
  np.testing.assert_allclose(compress(module, params, x[1:], last), out[1:], atol=2e-6)


@pytest.mark.parametrize('case', mostly_long(CASES))
def test_bfloat16_is_finite_and_near(case):
  module = make(case, dtype=jnp.bfloat16)
  params, x, beside = inputs(make(case))
  half = compress(module, params, *jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16),
                                                (x, beside)))
  assert half.dtype == jnp.bfloat16
  whole, _ = gradients(make(case), params, x, beside)
  assert np.abs(half.astype(jnp.float32) - whole).max() < 0.06 * np.abs(whole).max()


def given(module, grid=GRID, **beside):
  """Runs a module on zeros, as far as shapes go."""
  x = jnp.zeros((1, math.prod(grid), WIDTH))
  return jax.eval_shape(lambda: module.init(jax.random.key(0), TokenSet.create(x),
                                            Beside(grid, **beside)))


@pytest.mark.parametrize(('run', 'words'), [
    (lambda: given(Matryoshka(OUT, side=3)), 'choose sides that do'),
    (lambda: Matryoshka(OUT, side=3).slots(GRID), 'choose sides that do'),
    (lambda: given(Matryoshka(OUT), (2, 4, 4)), 'choose sides that do'),
    (lambda: QueCC(OUT, side=3).slots(GRID), 'choose sides that do'),
    (lambda: TokenFLEX(OUT, side=5).slots(GRID), 'choose at most 4'),
    (lambda: MQT(OUT, count=257), 'choose at most as many as there are'),
    (lambda: MQT(OUT, queries=5, count=5), 'choose a square number'),
    (lambda: MQT(OUT, keys='features'), 'choose one of positions, content'),
    (lambda: given(MQT(OUT, queries=4, count=2, heads=3)), 'change one of them'),
    (lambda: given(SliME(OUT, heads=3)), 'change one of them'),
    (lambda: given(SliMELocal(OUT, heads=3)), 'change one of them'),
    (lambda: given(SliMELocal(OUT, inner=6, heads=2)), 'divisible by 4'),
    (lambda: given(QueCC(OUT, side=2, heads=2)), 'give one, or choose a projector'),
    (lambda: given(QueCC(OUT, side=2, heads=2), question=jnp.zeros((1, OUT))),
     'give the features behind the layers'),
    (lambda: SliMERouter(4, route='bm25'), 'choose one of cosine, qformer'),
    (lambda: SliMERouter(4, top_p=1.5), 'must be from 0 to 1')])
def test_what_is_wrong_is_said_in_one_line(run, words):
  with pytest.raises(ValueError, match=words) as error:
    run()
  assert '\n' not in str(error.value)


@pytest.mark.long
@pytest.mark.parametrize('keys', KEYS)
def test_fewer_tokens_of_mqt_are_the_first_of_more(keys):
  module = MQT(OUT, queries=4, count=4, heads=2, keys=keys)
  params, x, beside = inputs(module)
  np.testing.assert_allclose(
      compress(module.clone(count=2), params, x, beside),
      compress(module, params, x, beside)[:, :2], atol=1e-6)


def norm(x, epsilon, scale, bias):
  middle = x.mean(axis=-1, keepdims=True)
  return (x - middle) / np.sqrt(x.var(axis=-1, keepdims=True) + epsilon) * scale + bias


@pytest.mark.long
def test_mqt_may_read_what_patches_hold():
  module = make('mqt:content')
  params, x, beside = inputs(module)
  own, x = jax.tree.map(np.asarray, (params, x))
  square = grids.sincos((2, 2), WIDTH).astype(np.float16).astype(np.float32)
  places = np.asarray(grids.resample(jnp.asarray(square[None]), (2, 2), GRID, 'bicubic'))
  q, k, v = (norm(each, 1e-6, **own[f'norm_{name}']) for name, each in (
      ('query', own['query'] + square), ('keys', x), ('values', x)))
  k = k + places
  kernel, bias = (own['attention']['qkv'][leaf] for leaf in ('kernel', 'bias'))
  q, k, v = (np.einsum('...nw,whd->...nhd', each, kernel[:, part]) + bias[part]
             for part, each in enumerate((q[:3], k, v)))
  scores = np.exp(np.einsum('mhd,bnhd->bhmn', q, k) / np.sqrt(WIDTH / 2))
  mixed = np.einsum('bhmn,bnhd->bmhd', scores / scores.sum(axis=-1, keepdims=True), v)
  mixed = np.einsum('bmhd,hdw->bmw', mixed, own['attention']['out']['kernel'])
  wanted = (mixed + own['attention']['out']['bias']) @ own['projection']
  np.testing.assert_allclose(compress(module, params, x, beside), wanted, atol=2e-5)


def test_tokenflex_averages_bins_that_overlap_and_gates_them():
  module = make('tokenflex')
  params, x, beside = inputs(module)
  own, x = jax.tree.map(np.asarray, (params, x))
  normed = norm(x, 1e-5, **own['norm']).reshape(BATCH, *GRID, WIDTH)
  bins = [slice(4 * i // 3, math.ceil(4 * (i + 1) / 3)) for i in range(3)]
  pooled = np.stack([normed[:, rows, columns].mean(axis=(1, 2))
                     for rows in bins for columns in bins], axis=1)
  gate, value = np.moveaxis(np.einsum('bnw,wgf->bngf', pooled, own['fc1']['kernel'])
                            + own['fc1']['bias'], 2, 0)
  hidden = gate / (1 + np.exp(-gate)) * value
  np.testing.assert_allclose(compress(module, params, x, beside),
                             hidden @ own['fc2']['kernel'] + own['fc2']['bias'], atol=1e-5)


def test_tokenflex_trains_on_28_percent_fewer_tokens():
  counts = [TokenFLEX(OUT, side=side).slots((24, 24)) for side in (8, 12, 16)]
  assert counts == [64, 144, 256]
  mean = np.average(counts, weights=(2, 3, 5))
  assert mean == 184
  assert round(100 * (1 - mean / 256)) == 28


@pytest.mark.long
def test_gates_of_slime_begin_even_and_are_noisy_in_training():
  x = inputs(make('slime'))[1]
  gates = Gates()
  params = gates.init(jax.random.key(0), x[:, :1])
  np.testing.assert_allclose(gates.apply(params, x), 0.5, atol=1e-6)
  noisy = jax.jit(lambda x: gates.apply(params, x, rngs={'dropout': jax.random.key(1)}))(x)
  assert np.abs(noisy - 0.5).min() > 0
  np.testing.assert_allclose(noisy.sum(axis=-1), 1, atol=2e-6)


SLOTS, IDS = 10, 5


def crops():
  """Tokens of crops, of which the second row has one less, and a prompt with padding."""
  rng = np.random.default_rng(3)
  x, text = (rng.normal(size=(BATCH, number, WIDTH)).astype(np.float32)
             for number in (SLOTS, IDS))
  return TokenSet.create(jnp.asarray(x), valid=jnp.arange(SLOTS)[None] < jnp.array([[10], [7]])), (
      jnp.asarray(text), jnp.arange(IDS)[None] < jnp.array([[5], [3]]))


def heaviest(weights, top_p, capacity):
  """Tells what of one row's weights stays, token by token."""
  chosen, total = [], 0.0
  for slot in sorted(range(len(weights)), key=lambda slot: -weights[slot]):
    if chosen and total > top_p:
      break
    chosen.append(slot)
    total += weights[slot]
  return sorted(chosen[:capacity])


def softmax(scores):
  raised = np.exp(scores - scores.max())
  return raised / raised.sum()


@functools.partial(jax.jit, static_argnums=0)
def routed(router, params, tokens, text, valid, rng=None):
  return router.apply({'params': params}, tokens, text, valid,
                      rngs=None if rng is None else {'dropout': rng})


@pytest.mark.parametrize(('top_p', 'capacity'), mostly_long(
    [(0.6, 10), (0.95, 3), (0.95, 10), (1.0, 12), (0.0, 4)]))
def test_the_router_of_slime_keeps_what_a_loop_keeps(top_p, capacity):
  tokens, (text, there) = crops()
  router = SliMERouter(capacity, top_p=top_p, temperature=0.7)
  left = routed(router, {}, tokens, text, there)
  assert left.x.shape == (BATCH, min(capacity, SLOTS), WIDTH)
  for row in range(BATCH):
    x = np.asarray(tokens.x[row])[np.asarray(tokens.real[row])]
    ids = np.asarray(text[row])[np.asarray(there[row])]
    scores = [sum(a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in ids) for a in x]
    kept = heaviest(softmax(np.array(scores) / 0.7), top_p, capacity)
    np.testing.assert_array_equal(np.asarray(left.pos[row])[np.asarray(left.valid[row])], kept)
    np.testing.assert_array_equal(np.asarray(left.x[row])[:len(kept)], x[kept])
    np.testing.assert_array_equal(np.flatnonzero(left.owner[row] >= 0), kept)


@pytest.mark.long
@pytest.mark.parametrize('route', ['qformer', 'qformer_logits'])
def test_the_network_of_the_router_of_slime_may_pass_two_softmaxes(route):
  tokens, (text, there) = crops()
  router, rng = SliMERouter(8, route=route, top_p=0.5, heads=2), np.random.default_rng(4)
  shapes = jax.eval_shape(router.init, jax.random.key(0), tokens, text, there)['params']
  params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), shapes)
  score = jax.jit(lambda text: Asked(2, jnp.float32).apply(
      {'params': params['asked']}, tokens.x, text, there))
  scores = score(text)
  np.testing.assert_array_equal(scores, score(jnp.where(there[..., None], text, 9.0)))
  left = routed(router, params, tokens, text, there)
  for row in range(BATCH):
    found = np.asarray(scores[row])[np.asarray(tokens.real[row])]
    found = softmax(found) if route == 'qformer' else found
    np.testing.assert_array_equal(np.asarray(left.pos[row])[np.asarray(left.valid[row])],
                                  heaviest(softmax(found), 0.5, 8))


@pytest.mark.long
def test_the_router_of_slime_is_noisy_in_training_and_reads_each_row_by_itself():
  tokens, (text, there) = crops()
  router = SliMERouter(4, top_p=0.3)
  left = routed(router, {}, tokens, text, there)
  chosen = {tuple(routed(router, {}, tokens, text, there, jax.random.key(seed)).pos[0].tolist())
            for seed in range(4)}
  assert len(chosen) > 1
  alone = routed(router, {}, *jax.tree.map(lambda leaf: leaf[1:], (tokens, text, there)))
  np.testing.assert_array_equal(alone.pos[0], left.pos[1])
  np.testing.assert_array_equal(alone.valid[0], left.valid[1])
