"""Methods that look at layers other than those they cut in.

Axes: B batch, N slots now.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import golden_vit, tiny_lm
from helpers.processes import COLLECTIVE, on_devices
from helpers.watcher import Watcher

from lib.cost import jaxpr as jaxpr_cost
from lib.cost import vit as vit_cost
from models.backbones.vit import Block, ViT
from models.plan import make_plan
from models.stack import Stack
from models.storage import unstack
from ops.primitives.select import keep_top
from ops.reducers import REDUCERS
from ops.reducers.base import Reducer
from ops.tokens import TokenSet

DEPTH = golden_vit.DEPTH
TINY = ViT(width=32, depth=DEPTH, mlp=48, heads=2, patch=4, image_size=16, num_classes=3)
HOST = TINY.host


@pytest.fixture(autouse=True)
def watcher(monkeypatch):
  monkeypatch.setitem(REDUCERS, 'watcher', Watcher)


def plan(host=HOST, **config):
  return make_plan({'method': 'watcher', 'keep': 8} | config, host)


def run(model, params, images, **config):
  planned = model.clone(plan=plan(model.host, **config))
  return compiled(planned)(params, images)


@functools.cache
def compiled(model):
  return jax.jit(lambda p, x: model.apply({'params': p}, x))


# -- the plan --------------------------------------------------------------------------------------


@pytest.mark.parametrize(('config', 'layers'), [
    ({'layers': 2}, (0, 1, 2)), ({'layers': (1, 3), 'keep': (12, 8)}, (0, 1, 2, 3)),
    ({'layers': 2, 'args': {'first': 1}}, (1, 2)), ({'layers': 2, 'watch': (1, 0)}, (0, 1)),
    ({'layers': 2, 'watch': [2]}, (2,)), ({'layers': 2, 'watch': 1}, (1,)),
    ({'layers': 2, 'watch': 'all'}, (0, 1, 2)), ({'layers': 2, 'watch': ()}, ()),
    ({'layers': 2, 'watch': []}, ()), ({'layers': 2, 'watch': None}, (0, 1, 2)),
    ({'layers': 2, 'site': 'before'}, (0, 1)),
    ({'layers': 2, 'site': 'before', 'watch': 'all'}, (0, 1)),
    ({'remove': 0, 'keep': None}, ())], ids=str)
def test_the_method_chooses_unless_the_config_says(config, layers):
  made = plan(**config)
  assert made.only.watch == layers
  assert made == plan(**config)
  hash(made)


@pytest.mark.parametrize(('config', 'message'), [
    ({'method': 'topk', 'watch': (0,)},
     'topk watches no layers, so watch=(0,) is of no use: leave it out'),
    ({'watch': 5}, 'layer 5 is out of range: the model has layers 0 to 3'),
    ({'watch': (1, 1)}, 'must name at least one layer, each once'),
    ({'watch': 'some'}, "'some' is unknown"),
    ({'watch': (0, 3)}, 'layer 3 is watched in vain, as watcher cuts nothing after it: watch '
                        'layers below 3'),
    ({'watch': (2,), 'site': 'before'}, 'layer 2 is watched in vain'),
    ({'wach': (2,)}, "no key 'wach' (did you mean 'watch'?)"),
], ids=str)
def test_errors(config, message):
  with pytest.raises(ValueError) as caught:  # noqa: PT011
    plan(**{'layers': 2} | config)
  assert message in str(caught.value)
  assert '\n' not in str(caught.value)


def test_a_watch_asks_of_the_host_too():
  host = TINY.clone(class_token=False, pool='mean').host
  with pytest.raises(ValueError, match='watcher needs cls_attention, which this host does not'):
    plan(host, layers=2)


@pytest.mark.parametrize('name', ['attention', 'next_received_attention'])
def test_a_watch_cannot_see_what_only_a_cut_can(name, monkeypatch):
  monkeypatch.setattr(Watcher, 'watch_needs', frozenset({name}))
  with pytest.raises(ValueError, match=f'watcher cannot watch {name}: a watched layer tells '
                                       'cls_attention, cls_logits, depth'):
    plan(layers=2)


# -- the run ---------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize(('site', 'layers'), [
    ('before', (1, 2)), ('between', (1, 2)), ('after', (2,)), ('inside', ())])
def test_stats_are_those_of_the_layers_watched(site, layers):
  """A sum over layers is the sum of what each layer tells alone, and decides the cut."""
  model, params, images = golden_vit.model(), golden_vit.params(), golden_vit.images()
  config = {'layers': 3, 'keep': 20, 'site': site}
  if not layers:
    layers = (1, 2, 3)
    config['args'] = {'first': 1}
  else:
    config['watch'] = layers
  _, out = run(model, params, images, **config)
  tokens = out['cuts'][3]
  np.testing.assert_array_equal(tokens.stats['layers'][0, 0], layers)

  expected = 0
  for layer in layers:
    # One layer alone, of the untouched model.
    _, probe = run(model, params, images, layers=layer, watch=layer, keep=63)
    expected += probe['before'][layer].stats['seen']
  np.testing.assert_allclose(out['before'][3].stats['seen'], expected, atol=1e-6, rtol=0)
  kept = np.sort(np.argsort(-np.asarray(expected)[:, 1:], axis=1)[:, :20], axis=1)
  np.testing.assert_array_equal(tokens.pos[:, 1:], kept)
  np.testing.assert_allclose(tokens.stats['seen'][:, 1:], np.take_along_axis(
      np.asarray(expected)[:, 1:], kept, axis=1), atol=1e-6, rtol=0)


@pytest.mark.long
def test_the_attention_watched_is_the_layers_own():
  """Against attention recomputed from the features that the layer got."""
  model, params, images = golden_vit.model(), golden_vit.params(), golden_vit.images()
  _, out = run(model, params, images, layers=2, keep=20, watch=(1,))
  _, full = compiled(model)(params, images)
  blocks = jax.tree.map(lambda leaf: leaf[1], params['stack']['blocks'])
  x = np.asarray(full['hidden'][0], np.float64)
  x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
  x = x * blocks['norm1']['scale'] + blocks['norm1']['bias']
  qkv = np.einsum('bnd,dkhe->kbhne', x, blocks['qkv']['kernel'])
  q, k, _ = qkv + blocks['qkv']['bias'][:, None, :, None]
  logits = np.einsum('bhe,bhne->bhn', q[:, :, 0], k) / np.sqrt(q.shape[-1])
  weights = np.exp(logits - logits.max(-1, keepdims=True))
  expected = (weights / weights.sum(-1, keepdims=True)).mean(axis=1)
  np.testing.assert_allclose(out['before'][2].stats['seen'], expected, atol=1e-5, rtol=0)


@pytest.mark.long
@pytest.mark.parametrize('mode', ['gather', 'mask'])
def test_stats_follow_their_tokens_through_cuts(mode):
  """Layer 3 adds to the sums of those that layer 1 left."""
  model, params, images = golden_vit.model(), golden_vit.params(), golden_vit.images()
  _, out = run(model, params, images, layers=(1, 3), keep=(30, 12), mode=mode)
  first, before, last = out['cuts'][1], out['before'][3], out['cuts'][3]
  np.testing.assert_array_equal(before.pos, first.pos)
  real = np.asarray(before.real)
  assert (np.asarray(before.stats['seen'] - first.stats['seen'])[real] > 0).all()
  assert real.sum() == 2 * 31
  scores = np.where(real & (np.asarray(before.kind) > 0), before.stats['seen'], -1)
  for row in range(2):
    best = np.argsort(-scores[row], kind='stable')[:12]
    kept = np.asarray(last.pos[row])[np.asarray(last.real)[row]]
    assert set(kept.tolist()) == {-1, *np.asarray(before.pos)[row, best].tolist()}


@pytest.mark.long
def test_padding_and_neighbours_change_nothing():
  """A row of fewer tokens, its padding full of 1e3, beside another row: as it is alone."""
  block = Block(32, 2, 48, parent=None)
  stack = Stack(block, 4, plan(layers=(1, 2), keep=(8, 6)))
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2, 17, 32)).astype(np.float32)
  kind = np.tile(np.where(np.arange(17) < 1, 0, 1), (2, 1)).astype(np.int8)

  def tokens(x, valid, rows):
    pos = jnp.tile(jnp.arange(x.shape[1], dtype=jnp.int32), (len(x), 1))
    return TokenSet.create(jnp.asarray(x), valid=valid, kind=jnp.asarray(kind[rows, :x.shape[1]]),
                           pos=pos, protected=1)

  short = x.copy()
  short[1, 12:] = 1e3
  valid = jnp.asarray(np.arange(17)[None] < np.array([[17], [12]]))
  params = jax.jit(stack.init)(jax.random.key(0), tokens(x, None, [0, 1]))
  apply = jax.jit(stack.apply)
  both, _ = apply(params, tokens(short, valid, [0, 1]))
  alone, _ = apply(params, tokens(x[1:, :12], None, [1]))
  np.testing.assert_array_equal(both.pos[1], alone.pos[0])
  np.testing.assert_allclose(both.stats['seen'][1], alone.stats['seen'][0], atol=1e-6, rtol=0)
  np.testing.assert_allclose(both.x[1], alone.x[0], atol=1e-5, rtol=0)


@pytest.mark.long
def test_both_forms_of_the_weights_watch_alike():
  model, params, images = golden_vit.model(), golden_vit.params(), golden_vit.images()
  loose = params | {'stack': {'blocks': unstack(params['stack']['blocks'], golden_vit.DEPTH)}}
  config = {'layers': 3, 'keep': 20, 'watch': (0, 2)}
  stacked, apart = (run(model, p, images, **config)[1]['cuts'][3] for p in (params, loose))
  np.testing.assert_array_equal(stacked.pos, apart.pos)
  np.testing.assert_allclose(stacked.stats['seen'], apart.stats['seen'], atol=1e-6, rtol=0)


class Entering(Watcher):
  """Takes down what enters a layer."""

  watch_needs = frozenset({'hidden_in'})

  def watch(self, tokens, signals):
    return {'seen': signals.hidden_in[..., 0]}


@pytest.mark.long
@pytest.mark.parametrize('site', ['inside', 'between'])
def test_a_watch_sees_what_entered_the_layer(site, monkeypatch):
  monkeypatch.setitem(REDUCERS, 'watcher', Entering)
  lm = tiny_lm.planned(method='watcher', layers=1, keep=4, site=site, watch=(1,), holds='none')
  _, out = jax.jit(lm.clone(capture=True).apply)(tiny_lm.variables(), tiny_lm.image_and_text())
  cut = out['cuts'][1]
  entered = np.asarray(out['hidden'][0])[np.arange(3)[:, None], np.asarray(cut.pos), 0]
  np.testing.assert_array_equal(cut.stats['seen'], entered)


# -- what it costs ---------------------------------------------------------------------------------


def test_who_watches_nothing_compiles_the_same(monkeypatch):
  """Not a letter of the program differs from that of a method without a watch."""

  def decide(self, tokens, signals, *, num_slots):
    return keep_top(tokens, tokens.x[..., 0], num_slots=num_slots)

  plain = dataclasses.dataclass(frozen=True)(type('Plain', (Reducer,), {'__call__': decide}))
  blind = type('Blind', (Watcher,), {'__call__': decide})
  images = jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32)
  params = jax.eval_shape(TINY.init, jax.random.key(0), images)
  texts = []
  for method, watch in ((plain, None), (blind, ()), (blind, None)):
    monkeypatch.setitem(REDUCERS, 'watcher', method)
    vit = TINY.clone(plan=plan(layers=2, watch=watch))
    texts.append(jax.jit(lambda p, x, vit=vit: vit.apply(p, x)[0]).lower(params, images).as_text())
  assert texts[0] == texts[1]
  assert texts[0] != texts[2]


@pytest.mark.parametrize('reads', [{'cls_attention'}, {}], ids=['attention', 'features'])
def test_only_watched_layers_leave_their_loop(reads, monkeypatch):
  monkeypatch.setattr(Watcher, 'watch_needs', frozenset(reads))
  if not reads:
    monkeypatch.setattr(Watcher, 'watch', lambda self, tokens, signals: {'seen': tokens.x[..., 0]})
  images = jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32)
  params = jax.eval_shape(TINY.init, jax.random.key(0), images)

  def loops(watch):
    # A cut before layer 3, by the sums alone, needs nothing of layer 2 itself.
    vit = TINY.clone(plan=plan(layers=3, site='before', watch=watch))
    text = str(jax.make_jaxpr(lambda p, x: vit.apply(p, x)[0])(params, images))
    return re.findall(r'length=(\d+)', text)

  assert loops((0,)) == loops((2,)) == ['2']
  assert loops((1,)) == loops((0, 1, 2)) == []


def test_costs_are_those_of_the_same_cuts_without_a_watch():
  watching = TINY.clone(plan=plan(layers=(1, 2), keep=(10, 8)))
  plain = TINY.clone(plan=make_plan({'method': 'topk', 'layers': (1, 2), 'keep': (10, 8)}, HOST))
  assert vit_cost.of(watching).macs == vit_cost.of(plain).macs
  found = jaxpr_cost.of_vit(watching)
  assert found.macs[''] == vit_cost.of(watching).macs
  # A row of the map in each watched layer: of 17 slots in layers 0 and 1, of 11 in layer 2.
  assert found.macs == {'': found.macs[''], 'signals': (17 + 17 + 11) * TINY.width}


MESH = '''
sys.path.insert(0, 'tests')
from ops.reducers import REDUCERS
from helpers.watcher import Watcher
counts = set()
class Spy(Watcher):
  def watch(self, tokens, signals):
    counts.add(len(tokens.x))
    return super().watch(tokens, signals)
REDUCERS['watcher'] = Spy
settings = {'method': 'watcher', 'layers': (1, 2), 'keep': (10, 6)}
params = init(small(None, depth=4), jax.random.key(0))
images = np.random.default_rng(0).normal(size=(16, 32, 32, 1)).astype(np.float32)
found = []
for mesh in (None, sharding.make_mesh(dict(data=8))):
  vit = small(mesh, settings, depth=4)
  counts.clear()
  places = {} if mesh is None else dict(
      in_shardings=(sharding.replicated(mesh), sharding.batch_sharding(mesh)),
      out_shardings=sharding.batch_sharding(mesh))
  run = jax.jit(lambda p, x: vit.apply({'params': p}, x)[1]['tokens'], **places)
  program = run.lower(params, images).compile()
  if mesh is not None:
    params, images = jax.device_put((params, images), places['in_shardings'])
  tokens = program(params, images)
  found.append([tokens.pos.tolist(), tokens.stats['seen'].tolist(),
                re.findall(sys.argv[1], program.as_text()), sorted(counts)])
print(json.dumps(found))
'''


@pytest.mark.long
def test_on_a_mesh_each_device_watches_its_own_rows():
  (pos, seen, _, _), (mesh_pos, mesh_seen, collectives, rows) = on_devices(8, MESH, COLLECTIVE)
  assert mesh_pos == pos
  np.testing.assert_allclose(mesh_seen, seen, atol=1e-6, rtol=0)
  assert collectives == []
  assert rows == [16 // 8]
