"""Branches: a part of a layer runs on fewer tokens, all of which stay.

Every method of a branch against what all of them promise, in a ViT and in a language model.

Axes: B batch, N slots, M slots that run.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.tiny_lm import PROMPT, ROOM, TINY, ids, image_and_text, variables

from models.backbones.vit import Block, ViT
from models.plan import branch_methods, make_plan
from models.plans.events import PARTS
from ops.primitives.select import keep_top
from ops.primitives.sparse_attention import HeadGather
from ops.reducers.base import BranchReducer
from ops.reducers.branch import BRANCHES
from ops.tokens import TEXT, VISUAL, TokenSet

LM = TINY.clone(depth=4, capture=True)
VIT = ViT(width=16, depth=4, mlp=24, heads=2, patch=4, image_size=16, channels=1, num_classes=3,
          capture=True)
IMAGES = np.asarray(jax.random.normal(jax.random.key(0), (3, 16, 16, 1)))


@dataclasses.dataclass(frozen=True)
class Loudest(BranchReducer):
  """Lets the tokens with the longest features run, and is asked even where all do."""

  gate: float | None = None
  parts: str = 'both'
  adaptive = 'it is not, but is asked'

  def __call__(self, tokens, signals, *, num_slots):
    picked = keep_top(tokens, jnp.sum(tokens.x ** 2, axis=2), num_slots=num_slots)
    if self.parts == 'core':
      return HeadGather(picked.src[:, None])
    gate = None if self.gate is None else jnp.full(picked.src.shape, self.gate)
    return picked.replace(gate=gate)


@pytest.fixture(autouse=True)
def loudest(monkeypatch):
  monkeypatch.setitem(BRANCHES, 'loudest', Loudest)


@functools.cache
def parameters(host):
  if host == 'lm':
    return variables(4)
  return jax.jit(VIT.init)(jax.random.key(1), IMAGES)


@functools.cache
def program(model):
  return jax.jit(model.apply)


def run(host, config, weights=None, inputs=None):
  """Features after every layer, outputs and what is told, under a reduction or none."""
  weights = parameters(host) if weights is None else weights
  model = LM if host == 'lm' else VIT
  inputs = (ids(PROMPT, 3) if host == 'lm' else IMAGES) if inputs is None else inputs
  if config:
    slots = inputs.slots if hasattr(inputs, 'slots') else inputs.shape[1]
    model = model.clone(plan=make_plan(config, model.host(slots) if host == 'lm' else model.host))
  outputs, out = jax.tree.map(np.asarray, program(model)(weights, inputs))
  return out['hidden'], outputs, out


def silenced(host, layer, *names):
  """The parameters, with some products of a layer at zero."""
  def change(path, leaf):
    named = any(getattr(key, 'key', None) in names for key in path)
    if not named:
      return leaf
    leaf = np.array(leaf)
    leaf[layer] = 0
    return leaf

  return jax.tree_util.tree_map_with_path(change, parameters(host))


@pytest.mark.long
@pytest.mark.parametrize(('host', 'parts'), [
    pytest.param(host, parts, marks=() if (host, parts) == ('lm', 'both') else pytest.mark.long)
    for host, each in (('lm', PARTS), ('vit', ('both', 'mlp'))) for parts in each])
def test_a_branch_of_all_tokens_is_the_layer(host, parts):
  config = {'method': 'loudest', 'layers': (1, 2), 'keep_ratio': 1.0, 'args': {'parts': parts}}
  _, want, _ = run(host, None)
  _, got, out = run(host, config)
  assert parts == 'core' or out['branches'].keys() == {1, 2}
  np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.long
@pytest.mark.parametrize(('host', 'parts'), [
    ('lm', 'both'), ('lm', 'attention'), ('lm', 'mlp'), ('vit', 'both')])
def test_a_gate_of_0_changes_nothing(host, parts):
  config = {'method': 'loudest', 'layers': 2, 'keep_ratio': 1.0,
            'args': {'parts': parts, 'gate': 0.0}}
  products = {'attention': ['out'], 'mlp': ['down', 'fc2']}
  names = [name for part, names in products.items() for name in names if parts in (part, 'both')]
  hidden, got, _ = run(host, config)
  _, want, _ = run(host, None, silenced(host, 2, *names))
  np.testing.assert_allclose(got, want, atol=1e-6)
  if parts == 'both':
    np.testing.assert_array_equal(hidden[2], hidden[1])


@pytest.mark.long
@pytest.mark.parametrize(('host', 'parts'), [
    *(('lm', parts) for parts in PARTS), ('vit', 'attention'), ('vit', 'mlp')])
def test_a_branch_is_the_layer_of_those_that_run(host, parts):
  """Each row's loudest tokens alone give what the branch adds to them; the others get nothing."""
  config = {'method': 'loudest', 'layers': 2, 'keep': 7, 'args': {'parts': parts, 'gate': 0.5}}
  hidden, _, _ = run(host, config)
  x = hidden[1] if parts != 'mlp' else half(host, 'attend', hidden[1])
  special = 1 - (host == 'lm')
  norms = np.sum(x ** 2, axis=2)
  norms[:, :special] = np.inf
  index = np.sort(np.argsort(-norms, axis=1, kind='stable')[:, :7 + special], axis=1)
  gate, x = np.float32(1.0 if parts == 'core' else 0.5), x.copy()
  ran = np.take_along_axis(x, index[..., None], axis=1)
  for method, runs in (('attend', parts != 'mlp'), ('feed_forward', parts in ('both', 'mlp'))):
    if runs:
      new = half(host, method, ran, index)
      x[np.arange(len(x))[:, None], index] += gate * (new - ran)
      ran = new
    elif method == 'feed_forward':
      x = half(host, method, x)
  np.testing.assert_allclose(hidden[2], x, atol=2e-6)


def half(host, method, x, index=None):
  """Layer 2 of the plain model as far as attention or the MLP, of features at some positions."""
  return np.asarray(half_program(host, method)(parameters(host)['params'], x, index))


@functools.cache
def half_program(host, method):
  block = LM.bind(parameters(host)).stack.block if host == 'lm' else Block(16, 2, 24)
  kwargs = {'needs': frozenset()} | ({'proportional': False} if method == 'attend' else {})

  @jax.jit
  def run(params, x, index):
    params = jax.tree.map(lambda leaf: leaf[2], params['stack']['blocks'])
    tokens = TokenSet.create(x, pos=index)
    return x + block.apply({'params': params}, tokens, method=method, **kwargs)[0]

  return run


# A method of a branch in a language model; of visual tokens alone where no kinds are named.
EVERY = {'token_kinds': ('visual', 'text')}
METHODS = {
    'pmod': {'method': 'pmod', 'layers': (1, 3), 'keep': 2},
    'gamma_mod': {'method': 'gamma_mod', **EVERY, 'layers': (1, 2, 3), 'keep_ratio': 1.0,
                  'args': {'threshold': 0.5, 'decode_threshold': 0.5}},
    'gamma_mod, visual': {'method': 'gamma_mod', 'layers': (1, 2), 'keep_ratio': 0.5,
                          'args': {'threshold': 0.4, 'decode_threshold': 0.0}},
    'token_sparse_attention': {
        'method': 'token_sparse_attention', **EVERY, 'layers': (1, 3), 'keep_ratio': 1.0,
        'args': {'window': 2, 'kernel': 3, 'coverage': 0.4, 'least': 1}},
    'token_sparse_attention, a layer': {
        'method': 'token_sparse_attention', **EVERY, 'layers': (0, 1, 3), 'keep_ratio': 0.6,
        'args': {'window': 2, 'kernel': 3, 'coverage': 0.0, 'select': 'layer'}},
    'skip_decode': {'method': 'skip_decode', **EVERY, 'layers': (1, 2), 'keep': (6, 7)},
    'yopo': {'method': 'yopo', 'layers': (1, 3), 'args': {'grid': (1, 2), 'window': 3,
                                                          'heads': (0, 1)}},
    'cmai': {'method': 'cmai', 'token_kinds': 'visual', 'layers': (1, 3)},
    'lemo, by threshold': {'method': 'lemo', **EVERY, 'layers': (1, 3), 'keep_ratio': 0.9,
                           'args': {'block': 2, 'threshold': 1.0}},
    'fastv': {'method': 'fastv', 'site': 'branch', 'layers': (1, 3),
              'keep': 2},
}
METHODS |= {name: {'method': name, **EVERY, 'layers': (1, 3), 'keep_ratio': 0.5}
            for name in branch_methods() if name not in METHODS}
# The first row is whole; the others have 4 visual tokens and 4 of text each, late and with holes.
VALID = np.stack([np.isin(np.arange(PROMPT), slots) for slots in (
    range(PROMPT), range(4, PROMPT), (0, 1, 2, 3, 4, 5, 8, 9))])
# A token of text is not told what stands behind it.
CAUSAL = ('pmod', 'gamma_mod', 'gamma_mod, visual', 'skip_decode', 'yopo')


def planned(config, tokens):
  """The language model under a reduction, for these tokens."""
  visual = int(np.max(np.sum(np.asarray(tokens.kind) == VISUAL, axis=1)))
  host = LM.host(tokens.slots, **({'visual': visual} if visual else {}))
  return LM.clone(plan=make_plan(config, host))


@functools.cache
def weights(name):
  """Parameters; those of routers are as random as the others."""
  lm, tokens = planned(METHODS[name], image_and_text()), image_and_text()
  shapes = jax.eval_shape(lm.init, jax.random.key(0), tokens)['params']['stack']
  rng = np.random.default_rng(3)
  routers = {key: jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype),
                               tree) for key, tree in shapes.items() if key != 'blocks'}
  params = parameters('lm')['params']
  return {'params': params | {'stack': params['stack'] | routers}}


@functools.cache
def batch(name):
  """Prompts with padding -> features of the last layer, compiled once."""
  lm, params = planned(METHODS[name], image_and_text(VALID)), weights(name)
  return jax.jit(lambda tokens: lm.apply(params, tokens)[1]['hidden'][-1])


def alone(tokens, row):
  """A row by itself, without padding."""
  own, place = jax.tree.map(lambda leaf: leaf[row:row + 1], tokens), np.flatnonzero(VALID[row])
  picked = {field: getattr(own, field)[:, place] for field in ('x', 'pos', 'kind')}
  return TokenSet.create(**picked)


@pytest.mark.long
@pytest.mark.parametrize('name', METHODS)
def test_a_row_of_a_batch_is_that_row_alone(name):
  tokens = image_and_text(VALID)
  features = batch(name)(tokens)
  plain = jax.jit(LM.apply)(parameters('lm'), tokens)[1]
  apply = jax.jit(planned(METHODS[name], alone(tokens, 1)).apply)
  for row in (1, 2):
    place = np.flatnonzero(VALID[row])
    _, single = apply(weights(name), alone(tokens, row))
    got, want = features[row, place], single['hidden'][-1][0]
    np.testing.assert_allclose(got, want, atol=2e-5)
    assert not np.allclose(got, plain['hidden'][-1][row, place], atol=1e-3)


@pytest.mark.long
@pytest.mark.parametrize('name', METHODS)
def test_rows_in_another_order_give_their_results_in_that_order(name):
  tokens, order = image_and_text(VALID), np.array([2, 0, 1])
  moved = jax.tree.map(lambda leaf: leaf[order], tokens)
  np.testing.assert_allclose(batch(name)(moved), batch(name)(tokens)[order], atol=1e-6)


@pytest.mark.long
@pytest.mark.parametrize('name', CAUSAL)
def test_no_token_is_told_what_stands_behind_it(name):
  tokens, ends = image_and_text(VALID), (np.arange(3), [11, 11, 9])
  other = tokens.replace(x=tokens.x.at[ends].set(tokens.x[:, 2]))
  got, want = (np.array(batch(name)(each)) for each in (other, tokens))
  assert not np.allclose(got[ends], want[ends], atol=1e-3)
  got[ends] = want[ends]
  np.testing.assert_array_equal(got[VALID], want[VALID])


SKIP = {'method': 'skip_decode', **EVERY, 'args': {'tokens': ROOM, 'least': 2}}


def reading(name, prompt):
  """What a config says where a prompt of so many tokens and its answer are read together."""
  if name != 'skip_decode':
    return METHODS[name]
  method = BRANCHES[name](**SKIP['args'])
  steps = tuple(method.decode_steps(layer, LM.depth) for layer in (1, 2))
  return SKIP | {'layers': (1, 2), 'keep': tuple(prompt + count for count in steps)}


@pytest.mark.long
@pytest.mark.parametrize('name', CAUSAL)
def test_reading_an_answer_with_its_prompt_is_decoding_it(name):
  """From a cache that holds, of every layer, the keys that its attention saw."""
  prompt, answer = image_and_text(VALID), ids(PROMPT + ROOM, 3)[:, PROMPT:]
  reader = planned(SKIP if name == 'skip_decode' else METHODS[name], prompt).clone(capture=False)
  params = weights(name)
  logits, cache = jax.jit(functools.partial(reader.apply, room=ROOM, method='prefill'))(
      params, prompt)
  got, decode = [logits], jax.jit(functools.partial(reader.apply, method='decode'))
  for step in range(ROOM):
    logits, cache = decode(params, answer[:, step], cache)
    got.append(logits)
  together = joined(prompt, answer, 1)
  apply = jax.jit(planned(reading(name, together.slots - ROOM), together).apply)
  for row in (1, 2):
    want, _ = apply(params, joined(prompt, answer, row))
    for step, logits in enumerate(got):
      np.testing.assert_allclose(logits[row], want[0, step - ROOM - 1], atol=1e-4)
  plain, _ = jax.jit(LM.apply)(parameters('lm'), together)
  assert not np.allclose(got[-1][1], plain[0, -1], atol=1e-2)


def joined(prompt, answer, row):
  """A row's prompt, without padding, and its answer."""
  tokens = alone(prompt, row)
  x = LM.apply(parameters('lm'), answer[row:row + 1], method='embed').x
  length = tokens.slots + x.shape[1]
  kind = jnp.pad(tokens.kind, ((0, 0), (0, x.shape[1])), constant_values=TEXT)
  return TokenSet.create(jnp.concatenate([tokens.x, x], axis=1), kind=kind,
                         pos=jnp.arange(length, dtype=jnp.int32)[None])


@pytest.mark.long
def test_a_layer_that_no_longer_runs_keeps_its_cache():
  lm = LM.clone(capture=False)
  lm = lm.clone(plan=make_plan(SKIP | {'token_kinds': None}, lm.host(PROMPT)))
  method = lm.plan.only.method
  assert [method.active(step, 4) for step in range(5)] == [4, 4, 3, 2, 2]
  limits = [method.decode_steps(layer, 4) for layer in range(4)]
  assert limits == [None, 2, 3, None]
  _, cache = jax.jit(functools.partial(lm.apply, room=ROOM, method='prefill'))(
      parameters('lm'), ids(PROMPT, 3))
  decode = jax.jit(functools.partial(lm.apply, method='decode'), donate_argnums=2)
  for step in range(ROOM):
    _, cache = decode(parameters('lm'), ids()[:, step], cache)
  held = [int(kv.valid[0].sum()) - PROMPT for kv in cache.layers]
  assert held == [ROOM if limit is None else limit for limit in limits]


@pytest.mark.long
@pytest.mark.parametrize('name', sorted(branch_methods()))
def test_every_method_in_a_vit(name):
  """It runs on fewer patches, trains its router, and all patches stay; or says what it lacks."""
  method = branch_methods()[name]()
  config = {'method': name, 'layers': (1, 3)} | ({} if name == 'yopo' else {'keep': 5})
  if method.needs - VIT.host.offers:
    missing = ', '.join(sorted(method.needs - VIT.host.offers))
    with pytest.raises(ValueError, match=f'{name} needs {missing}, which this host does not'):
      make_plan(config, VIT.host)
    return
  vit = VIT.clone(plan=make_plan(config, VIT.host), remat='full')
  routers = [event.parameters for event in vit.plan.events if event.reduction.learned]
  if not routers:
    _, out = jax.eval_shape(vit.apply, parameters('vit'), IMAGES)
    check_ran(method, out)
    return
  params = jax.jit(vit.init)(jax.random.key(1), IMAGES)
  params = jax.tree.map(lambda leaf: leaf + 0.01, params)

  def loss(params, key):
    _, out = vit.apply(params, IMAGES, rngs={'dropout': key})
    return jnp.sum(out['hidden'][-1] ** 2) + sum(map(jnp.sum, out['losses'].values())), out

  grads, out = jax.jit(jax.grad(loss, has_aux=True))(params, jax.random.key(2))
  check_ran(method, out)
  for leaf in jax.tree.leaves([grads['params']['stack'][name] for name in routers]):
    assert jnp.any(leaf != 0), leaf.shape


def check_ran(method, out):
  """All patches stay, of which 5, and [CLS], ran two layers."""
  assert out['hidden'][-1].shape == out['hidden'][0].shape
  ran = {layer: tokens.slots for layer, tokens in out['branches'].items()}
  assert ran == ({} if method.parts == 'core' else {1: 6, 3: 6})


BOTH = {'method': 'loudest', 'layers': 1, 'keep': 5}
TOPK = {'method': 'topk', 'layers': 1, 'keep': 5}


@pytest.mark.parametrize(('config', 'message'), [
    (BOTH | {'layers': 4}, 'layer 4 is out of range: the model has layers 0 to 3'),
    (BOTH | {'keep': 17}, 'keep=17 in layer 1 is impossible: 16 tokens are there'),
    (BOTH | {'parts': 'mpl'}, "parts='mpl' is unknown (did you mean 'mlp'?): choose one of both, "
                              'attention, mlp, core'),
    (BOTH | {'parts': 'core'}, "loudest is a branch of 'both', so parts='core' does not fit"),
    (BOTH | {'site': 'after'}, "loudest is a branch of a layer, from which no token leaves, so it "
                               "cannot act at site='after': choose another method, or "
                               "site='branch'"),
    (BOTH | {'mode': 'mask'}, "loudest in a branch lets all tokens stay, so mode='mask' and "
                              "positions='keep' do not fit"),
    (TOPK | {'parts': 'mlp'}, "parts='mlp' is of a branch, and topk acts between"),
    (TOPK | {'site': 'branch', 'layers': 0}, 'topk in a branch of layer 0 has no earlier layer to '
                                             'read cls_attention from: start at layer 1'),
    ([BOTH, TOPK], "topk (between) acts where the branch of loudest in layer 1 already runs on "
                   "other tokens (parts='both'): give it another layer"),
    ([BOTH, BOTH | {'parts': 'mlp'}], 'loudest (branch) acts where the branch of loudest in layer '
                                      '1 already runs'),
    ([BOTH, TOPK | {'site': 'before', 'layers': 2}],
     'topk in layer 2 reads cls_attention, which the branch of loudest in layer 1 measures of some '
     'tokens alone: leave a layer between them'),
    ([BOTH, {'method': 'flowcut', 'layers': 2, 'keep': 5, 'watch': (1, 2)}],
     'flowcut watches layer 1, where the branch of loudest in layer 1 runs some tokens alone: '
     'watch other layers'),
], ids=str)
def test_what_contradicts_itself_is_one_line_when_the_model_is_built(config, message):
  with pytest.raises(ValueError) as caught:  # noqa: PT011
    make_plan(config, VIT.host)
  assert message in str(caught.value)
  assert '\n' not in str(caught.value)


YOPO = METHODS['yopo']


@pytest.mark.parametrize(('settings', 'config', 'message'), [
    ({'window': 4}, YOPO, 'neighbours of patches do not go with a window of 4 positions'),
    ({}, YOPO | {'args': {'grid': (2, 2)}}, '6 patches are no images of 2 x 2: set args.grid'),
    ({}, YOPO | {'args': {'grid': (1, 2), 'heads': (0,)}},
     r'of heads \[0\] some share keys and values with others, 2 to each'),
    ({}, {'method': 'tome', 'site': 'branch', 'keep': 3, 'layers': 1},
     'tome joins tokens in a branch, where causal attention would give earlier ones')])
def test_what_a_language_model_cannot_carry_out_is_one_line(settings, config, message):
  tokens = image_and_text()
  lm = LM.clone(**settings)
  lm = lm.clone(plan=make_plan(config, lm.host(PROMPT, visual=6)))
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(lm.apply, parameters('lm'), tokens)


@pytest.mark.long
@pytest.mark.parametrize(('parts', 'window'), [
    ('both', None), ('attention', None), ('mlp', (2, 2))])
def test_any_other_method_is_a_branch_too(parts, window):
  """Merged patches share what their group gets (as in ToMe for diffusion, arXiv:2303.17604)."""
  vit = VIT.clone(window=window, whole_layers=(2,) if window else ())
  config = {'method': 'tome', 'site': 'branch', 'parts': parts, 'layers': (1, 3), 'remove': 4}
  vit = vit.clone(plan=make_plan(config, vit.host))
  _, out = jax.eval_shape(vit.apply, parameters('vit'), IMAGES)
  assert out['tokens'].x.shape == (3, 17, 16)
  assert {layer: ran.x.shape for layer, ran in out['branches'].items()} == {
      1: (3, 13, 16), 3: (3, 13, 16)}
