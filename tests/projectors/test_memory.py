"""Compressors that leave a memory, which layers of the language model read.

Axes: B batch, T ids of a row, C crops of a row, S entries of a row's memory, R patches of a region,
D width of the language model, H heads, d features a head.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import errors

from configs.parts import VLM_SHARDING
from lib.cost import explain, jaxpr
from lib.cost import vlm as vlm_cost
from lib.runtime import sharding
from models import checkpoints
from models.backbones.images import Images
from models.checkpoints.layout import flatten
from models.checkpoints.vlm_config import from_config, make_vlm
from models.memory import Kept
from models.plan import make_plan
from models.projectors import make_projector
from models.projectors.crosslmm import DualAttention, Patches
from models.projectors.vision_remember import RegionAttention, Regions
from models.reduce_config import with_plans, with_projector_reduction
from models.storage import to_storage
from ops.tokens import TEXT, VISUAL, TokenSet

IMAGE, WIDTH, DEPTH, LENGTH = 30, 8, 3, 6
LLAVA = {
    'model_type': 'llava', 'image_token_id': IMAGE,
    'text_config': {'model_type': 'llama', 'vocab_size': 40, 'hidden_size': WIDTH,
                    'intermediate_size': 12, 'num_hidden_layers': DEPTH,
                    'num_attention_heads': 2, 'num_key_value_heads': 2},
    # LLaVA leaves the tower's last layer out.
    'vision_config': {'model_type': 'clip_vision_model', 'hidden_size': 8, 'intermediate_size': 8,
                      'num_hidden_layers': 2, 'num_attention_heads': 2, 'image_size': 8,
                      'patch_size': 2}}
ARGS = {
    'crosslmm': {'side': 2, 'every': 2},
    'vision_remember': {'every': 1, 'heads': 2, 'inner': 4, 'levels': (0, 0)},
    'vlora': {'layers': DEPTH, 'every': 3, 'rank': 2, 'inner': 4, 'depth': 1, 'heads': 2, 'mlp': 4}}
CROPS = {'crosslmm': 2, 'vision_remember': 2, 'vlora': 1}
READS = {'crosslmm': (0, 2), 'vision_remember': (1, 2), 'vlora': (2,)}
# An image in front, text before the images, text alone; padded on the right.
REAL = np.array([6, 5, 4])
VALID = np.arange(LENGTH)[None] < REAL[:, None]
# Those of the last two tokens of each row are decoded.
PROMPT = np.arange(LENGTH)[None] < REAL[:, None] - 2
CLOSE = {'atol': 2e-5, 'rtol': 0}
names = pytest.mark.parametrize('name', ARGS)


def ids_of(name):
  second = [4, IMAGE, IMAGE, 5, 6, 0] if CROPS[name] == 2 else [4, 9, IMAGE, 5, 6, 0]
  return np.array([[IMAGE, 1, 2, 3, 5, 7], second, [7, 8, 3, 2, 0, 0]])


def images_of(name, seed=0):
  pixels = np.random.default_rng(seed).normal(size=(3, CROPS[name], 8, 8, 3))
  return Images(pixels.astype(np.float32))


def model(name, dtype=jnp.float32, **args):
  vlm = from_config(LLAVA)
  vlm = vlm.clone(tower=vlm.tower.clone(dtype=dtype), lm=vlm.lm.clone(dtype=dtype))
  made = make_projector({'name': name, 'args': ARGS[name] | args}, width=WIDTH, dtype=dtype)
  return vlm.clone(projection='', compressor=made)


def drawn(shapes, scale=0.5):
  """Random parameters."""
  leaves, tree = jax.tree.flatten(shapes)
  rng = np.random.default_rng(0)
  return jax.tree.unflatten(tree, [
      jnp.asarray(scale * rng.normal(size=leaf.shape), leaf.dtype) for leaf in leaves])


def shapes_of(name):
  return jax.eval_shape(model(name).init, jax.random.key(0), ids_of(name), VALID,
                        images_of(name))['params']


@functools.cache
def parameters(name):
  return drawn(shapes_of(name))


@functools.cache
def program(name, method='__call__', **settings):
  vlm = model(name)
  return jax.jit(lambda params, *args: vlm.apply({'params': params}, *args, method=method,
                                                 **settings))


def whole(name, params=None, ids=None, images=None):
  """Logits of every slot, and the model's dict, in numpy."""
  return jax.tree.map(np.asarray, program(name)(
      parameters(name) if params is None else params, ids_of(name) if ids is None else ids, VALID,
      images or images_of(name)))


@functools.cache
def usual(name):
  return whole(name)


def unread(params):
  """Parameters under which layers read nothing: all gates shut, and no second factor."""
  return jax.tree_util.tree_map_with_path(
      lambda path, leaf: leaf * (path[-1].key not in ('gate', 'shared')), params)


@pytest.mark.long
@names
def test_prefill_and_decoding_equal_the_whole_pass(name):
  ids, params = ids_of(name), parameters(name)
  logits, out = usual(name)
  found, cache = program(name, 'prefill', room=2)(params, ids, PROMPT, images_of(name))
  # Per layer, as generation has it.
  params = to_storage(params, storage='unstacked')
  for behind in (3, 2, 1):
    row = np.array([0, 2] if behind == 3 else [0, 1, 2])  # Row 1's prompt ends in an image.
    slot = out['slot'][row, REAL[row] - behind]
    np.testing.assert_allclose(found[row], logits[row, slot], **CLOSE)
    if behind > 1:
      found, cache = program(name, 'decode')(params, ids[np.arange(3), REAL - behind + 1], cache)
  assert (cache.memory is None) == (name == 'vision_remember')
  if cache.memory:
    assert isinstance(cache.memory, Kept)
    assert tuple(cache.memory.layers) == READS[name]


@pytest.mark.long
@names
def test_text_without_an_image_is_as_it_was_and_rows_are_each_by_itself(name):
  logits, out = usual(name)
  others = np.array(images_of(name, seed=1).pixels)
  others[0] = images_of(name).pixels[0]
  again, _ = whole(name, images=Images(others))
  np.testing.assert_allclose(again[[0, 2]], logits[[0, 2]], atol=1e-6)
  assert np.abs(again[1] - logits[1])[-1].max() > 1e-3
  alone, told = program(name)(parameters(name), ids_of(name)[2:, :4], VALID[2:, :4], None)
  np.testing.assert_allclose(alone[0, told['slot'][0]], logits[2, out['slot'][2, :4]], **CLOSE)


@pytest.mark.long
@names
def test_a_padded_row_is_the_row_alone(name):
  logits, out = usual(name)
  pixels = images_of(name).pixels[:1, :1]
  alone, told = program(name)(parameters(name), ids_of(name)[:1], VALID[:1], Images(pixels))
  # Of an image that leaves no tokens the placeholder has no slot.
  np.testing.assert_allclose(alone[0, told['slot'][0, 1:]], logits[0, out['slot'][0, 1:]], **CLOSE)


@pytest.mark.long
@names
def test_shut_gates_leave_what_the_tokens_alone_make(name):
  params, vlm = unread(parameters(name)), model(name)
  logits, out = whole(name, params)
  lm = vlm.lm.clone(reader=None)
  own = {part: leaf for part, leaf in params['lm'].items() if part != 'reader'}
  plain, _ = jax.jit(lm.apply)({'params': own}, out['sequence'])
  np.testing.assert_allclose(logits, plain, **CLOSE)
  beyond = np.abs(usual(name)[0] - logits).max(axis=(1, 2))
  assert (beyond[:2] > 1e-3).all()
  np.testing.assert_allclose(beyond[2], 0, atol=2e-5)


@pytest.mark.long
@pytest.mark.parametrize('name', ['crosslmm', 'vlora'])
def test_a_chunk_behind_the_prompt_reads_the_memory_too(name):
  ids, params, rows = ids_of(name), parameters(name), np.array([2, 0, 0])
  _, cache = program(name, 'prefill', room=2)(params, ids, PROMPT, images_of(name))
  chunk = np.stack([ids[row, REAL[row] - 2:REAL[row]] for row in rows])
  found, _ = program(name, 'extend')(params, chunk, cache.take(rows), chunk > 0)
  logits, out = usual(name)
  for i, row in enumerate(rows):
    np.testing.assert_allclose(found[i], logits[row, out['slot'][row, REAL[row] - 1]], **CLOSE)


@pytest.mark.long
@names
def test_bfloat16_is_finite_and_near(name):
  vlm, half = model(name, jnp.bfloat16), jax.tree.map(
      lambda leaf: 0.3 * leaf.astype(jnp.bfloat16), parameters(name))
  logits = jax.jit(lambda params: vlm.apply(
      {'params': params}, ids_of(name), VALID, images_of(name))[0])(half)
  exact, _ = whole(name, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), half))
  assert np.abs(logits - exact).max() < 0.06 * np.abs(exact).max()


@names
def test_without_a_memory_nothing_changes(name):
  lm, ids = model(name).lm, jnp.zeros((1, 4), jnp.int32)
  plain = lm.clone(reader=None)
  params = jax.eval_shape(plain.init, jax.random.key(0), ids)
  assert jax.tree.structure(params) == jax.tree.structure(
      jax.eval_shape(lm.init, jax.random.key(0), ids))
  told = [str(jax.make_jaxpr(functools.partial(each.apply, room=2, method='prefill'))(params, ids))
          for each in (lm, plain)]
  assert told[0] == told[1]
  _, cache = jax.eval_shape(functools.partial(lm.apply, room=2, method='prefill'), params, ids)
  assert len(jax.tree.leaves(cache)) == 1 + len(jax.tree.leaves(cache.layers))


def softmax(scores):
  raised = np.exp(scores - scores.max(axis=-1, keepdims=True))
  return raised / raised.sum(axis=-1, keepdims=True)


@pytest.mark.long
def test_two_attentions_by_hand():
  """V2V and T2V of CrossLMM; a patch of the second row is of an image that it does not have."""
  rng = np.random.default_rng(0)
  x, patches = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 5, 8), (2, 3, 8)))
  kind = np.array([[TEXT, VISUAL, VISUAL, TEXT, TEXT], [VISUAL, VISUAL, TEXT, TEXT, TEXT]])
  seen = np.array([[1, 1, 1], [1, 1, 0]], bool)
  reader = DualAttention((4,), 8, 4, 2, 2, jnp.float32)
  tokens = TokenSet.create(jnp.asarray(x), kind=jnp.asarray(kind, jnp.int8))
  memory = Patches(None, jnp.asarray(patches), jnp.asarray(seen), 2)
  params = drawn(jax.eval_shape(reader.init, jax.random.key(0), memory, tokens)['params'], 1.0)
  (_, kept, (found,)) = jax.jit(reader.apply)({'params': params}, memory, tokens)
  own = jax.tree.map(np.asarray, params)
  wanted = np.zeros_like(x)
  for row, slot in np.ndindex(2, 5):
    part = own['visual_0' if kind[row, slot] == VISUAL else 'text_0']
    q = np.einsum('d,dhe->he', x[row, slot], part['q']['kernel'])
    k, v = (np.einsum('sd,dhe->she', patches[row][seen[row]], part[leaf]['kernel'])
            for leaf in 'kv')
    for head in range(4):
      weights = softmax(k[:, head // 2] @ q[head] / np.sqrt(2))
      wanted[row, slot] += (weights @ v[:, head // 2]) @ part['out']['kernel'][head]
    wanted[row, slot] *= np.tanh(part['gate'])
  np.testing.assert_allclose(found, wanted, atol=1e-4)
  assert kept[4].visual is None
  followed = reader.apply({'params': params}, 4, jnp.asarray(x[:, 2:]), kept[4],
                          method='read_text')
  np.testing.assert_allclose(followed[:, 1:], wanted[:, 3:], atol=1e-4)


@pytest.mark.long
def test_a_visual_token_attends_to_its_region_alone():
  """Vision Remember; padding that counts as visual stands in front in the second row."""
  rng = np.random.default_rng(0)
  x, regions = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 4, 8), (2, 3, 2, 6)))
  kind = np.array([[VISUAL, TEXT, VISUAL, VISUAL], [VISUAL, VISUAL, VISUAL, TEXT]])
  real = np.array([[1, 1, 1, 1], [0, 1, 1, 1]], bool)
  tokens = TokenSet.create(jnp.asarray(x), kind=jnp.asarray(kind, jnp.int8),
                           valid=jnp.asarray(real))
  memory = Regions(None, jnp.asarray(regions), jnp.asarray([[1, 1, 1], [1, 1, 0]], bool))
  reader = RegionAttention((2,), 4, 2, jnp.float32)
  params = drawn(jax.eval_shape(reader.init, jax.random.key(0), memory, tokens)['params'], 1.0)
  run = jax.jit(lambda memory, tokens: reader.apply({'params': params}, memory, tokens)[2][0])
  found = run(memory, tokens)
  places = [[0, 2, 3], [1, 2]]
  assert np.abs(np.stack([found[row][place] for row, own in enumerate(places)
                          for place in own])).max(axis=1).min() > 1e-3
  assert not found[0, 1].any()
  assert not found[1, [0, 3]].any()
  for row, own in enumerate(places):
    for region, place in enumerate(own):
      other = run(memory.replace(x=memory.x.at[row, region].add(1.0)), tokens)
      moved = np.argwhere(np.abs(other - found).max(axis=2) > 1e-5)
      np.testing.assert_array_equal(moved, [[row, place]])
  own, row, place, region = jax.tree.map(np.asarray, params), 1, 2, 1

  def norm(x, part):
    middle = x.mean(axis=-1, keepdims=True)
    return (x - middle) / np.sqrt(x.var(axis=-1, keepdims=True) + 1e-6) * part['scale'] + (
        part['bias'])

  def mlp(x, part):
    x = np.asarray(jax.nn.gelu(x @ part['fc1']['kernel'] + part['fc1']['bias'], approximate=False))
    return x @ part['fc2']['kernel'] + part['fc2']['bias']

  part, source = own['regions_0'], own['sources_0']
  query = norm(x[row, place] @ part['query']['kernel'], part['norm_query'])
  keys, values = (norm(mlp(regions[row, region], source[name]), source[f'norm_{name}'])
                  for name in ('keys', 'values'))
  kernel, bias = part['attention']['qkv']['kernel'], part['attention']['qkv']['bias']
  q, k, v = (np.einsum('...w,whd->...hd', each, kernel[:, i]) + bias[i]
             for i, each in enumerate((query, keys, values)))
  weights = softmax(np.einsum('hd,rhd->hr', q, k) / np.sqrt(2))
  mixed = np.einsum('hr,rhd,hdw->w', weights, v, part['attention']['out']['kernel'])
  mixed = mixed + part['attention']['out']['bias']
  wanted = np.tanh(part['gate']) * (mixed @ part['projection']['kernel']
                                    + part['projection']['bias'])
  np.testing.assert_allclose(found[row, place], wanted, atol=1e-4)


@pytest.mark.long
def test_generated_weights_are_as_if_they_stood_in_the_layer():
  """VLoRA, but for the MLP's, which is of no single product."""
  name = 'vlora'
  params, vlm = parameters(name), model(name)
  shared = params['compressor']['shared'].at[0, -1].set(0.0)  # Of the MLP, in its one layer.
  params = {**params, 'compressor': {**params['compressor'], 'shared': shared}}
  logits, out = whole(name, params)
  blocks = dict(params['lm']['stack']['blocks'])
  row, layer, (rank, alpha) = 0, DEPTH - 1, (2, 64.0)
  assert 'memory' not in out, 'what layers read is no output'
  memory = jax.jit(lambda params: vlm.apply(
      {'params': params}, ids_of(name), VALID, images_of(name), method='sequence')[1]['memory'])(
          params)
  for i, kind in enumerate(('q', 'k', 'v', 'out')):
    b = np.asarray(shared)[0, i].reshape(WIDTH, rank) * alpha / rank
    change = np.asarray(memory.a)[row, i, 0] @ b.T
    kernel = np.array(blocks[kind]['kernel'])
    kernel[layer] += change.reshape(kernel[layer].shape)
    blocks[kind] = {**blocks[kind], 'kernel': kernel}
  merged = {**params['lm'], 'stack': {**params['lm']['stack'], 'blocks': blocks}}
  plain, _ = jax.jit(vlm.lm.clone(reader=None).apply)({'params': merged}, out['sequence'])
  np.testing.assert_allclose(logits[row], plain[row], atol=1e-4)
  assert np.abs(logits[1] - plain[1]).max() > 1e-3


@pytest.mark.long
@names
def test_costs_equal_the_traced_program(name):
  vlm, params, layout = model(name), {'params': shapes_of(name)}, (CROPS[name],) * 2 + (0,)
  cost = vlm_cost.of(vlm, LENGTH, layout, room=2)
  shape = jax.ShapeDtypeStruct
  args = (params, shape((1, LENGTH), jnp.int32), shape((1, LENGTH), bool),
          Images(shape((1, CROPS[name], 8, 8, 3), jnp.float32)))
  prefill = functools.partial(vlm.apply, room=2, method='prefill')
  assert jaxpr.count(prefill, *args).total == cost.macs
  _, cache = jax.eval_shape(prefill, *args)
  decode = functools.partial(vlm.apply, method='decode')
  read = cost.lm.decode_macs + sum(2 * (2 - 1) * WIDTH for _ in cost.lm.layers)  # All room is read.
  assert jaxpr.count(decode, params, shape((1,), jnp.int32), cache).total == (
      read + cost.memory.decode_macs)
  assert sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache.memory)) == (
      cost.memory.kept_bytes)
  assert cost.weight_bytes == 4 * sum(leaf.size for leaf in jax.tree.leaves(params))
  assert {path: leaf.shape for path, leaf in flatten(shapes_of(name)).items()} == (
      checkpoints._shapes(vlm))
  told = explain.describe(vlm, prompt=LENGTH, new_tokens=2, layout=layout)
  assert f'layers {", ".join(map(str, READS[name]))} read it' in told


@pytest.mark.long
def test_costs_at_the_size_of_llava_by_hand():
  vlm, wide, patches, prompt = make_vlm('llava1.5_7b'), 4096, 576, 40
  made = functools.partial(make_projector, width=wide, dtype=jnp.float32)

  def cost(name):
    return vlm_cost.of(vlm.clone(projection='', compressor=made({'name': name})), prompt, (1, 1, 0))

  cross, generated, again = map(cost, ('crosslmm', 'vlora', 'vision_remember'))
  assert (cross.visual, generated.visual, again.visual) == (9, 0, 144)
  layers, queries = 8, prompt + 9  # Of 32.
  projected = 2 * 2 * patches * wide ** 2  # Keys and values of both attentions.
  assert cross.memory.macs == layers * (
      projected + 2 * queries * wide ** 2 + 2 * queries * patches * wide)
  assert cross.memory.decode_macs == layers * (2 * wide ** 2 + 2 * patches * wide)
  assert cross.memory.parameters == layers * 2 * (4 * wide ** 2 + 1)
  assert generated.memory.macs == layers * 5 * prompt * 2 * wide * 64
  assert generated.memory.decode_macs * prompt == generated.memory.macs
  assert generated.memory.kept_bytes == 2 * layers * 5 * wide * 64 * 4
  assert (again.memory.decode_macs, again.memory.kept_bytes) == (0, 0)


@names
def test_parameters_have_places_on_a_mesh(name):
  mesh = jax.sharding.AbstractMesh((1, 1, 2, 1), sharding.AXES)
  places = sharding.make_shardings(shapes_of(name), VLM_SHARDING, mesh)
  divided = {path for path, place in flatten(places['lm']).items() if 'tensor' in place.spec}
  assert 'stack/blocks/q/kernel' in divided
  if name == 'crosslmm':
    assert {f'reader/text_0/{part}/kernel' for part in ('q', 'k', 'v', 'out')} < divided


def refused(name, **changes):
  vlm = model(name)
  return errors.said(lambda: vlm.clone(**changes))


@pytest.mark.long
def test_what_cannot_go_together_is_refused():
  vlm, ids = model('crosslmm'), ids_of('crosslmm')
  plan = make_plan({'method': 'stride', 'token_kinds': 'visual', 'layers': (1,), 'keep': 2,
                    'site': 'before'}, vlm.lm.host(14, visual=8))
  assert 'leave reduce.language out' in refused('crosslmm', lm=vlm.lm.clone(reader=None, plan=plan))
  assert 'leave reduce.projector out' in errors.said(
      with_projector_reduction, vlm, {'method': 'divprune', 'keep': 3}, slots=4)
  assert 'set compressor.args.every' in errors.said(model, 'vision_remember', every=3)
  assert 'choose at most 4' in errors.said(model, 'crosslmm', side=5)
  assert f'set compressor.args.layers={DEPTH}' in errors.said(model, 'vlora', layers=6)
  assert 'kv heads too' in refused('vlora', lm=model('vlora').lm.clone(kv_heads=1))

  def run(name, images, method='__call__', **settings):
    return errors.said(jax.eval_shape, functools.partial(
        model(name).apply, method=method, **settings), {'params': shapes_of(name)}, ids, VALID,
        images)

  assert 'one image a row' in run('vlora', images_of('crosslmm'))
  index = jnp.zeros((3, 1, 4, 1), jnp.int32)
  assert 'leave index and weight out' in run('crosslmm', images_of('crosslmm').replace(
      index=index, weight=jnp.ones(index.shape)))
  _, cache = jax.eval_shape(functools.partial(vlm.apply, method='prefill', room=9),
                            {'params': shapes_of('crosslmm')}, ids, VALID, images_of('crosslmm'))
  assert 'give images to prefill' in errors.said(
      jax.eval_shape, functools.partial(vlm.apply, method='extend'),
      {'params': shapes_of('crosslmm')}, ids, cache, VALID, images_of('crosslmm'))


@pytest.mark.long
@names
def test_a_cut_cache_still_reads_all_of_the_memory(name):
  settings = {'method': 'streaming_llm', 'keep': 5}
  layout = (CROPS[name],) * 2 + (0,)
  vlm = with_plans(model(name), cache=settings)(LENGTH, layout)
  run = functools.partial(jax.eval_shape, functools.partial(vlm.apply, room=2, method='prefill'))
  _, cut = run({'params': shapes_of(name)}, ids_of(name), PROMPT, images_of(name))
  _, uncut = jax.eval_shape(functools.partial(model(name).apply, room=2, method='prefill'),
                            {'params': shapes_of(name)}, ids_of(name), PROMPT, images_of(name))
  assert cut.layers[0].filled == 5
  assert jax.tree.map(jnp.shape, cut.memory) == jax.tree.map(jnp.shape, uncut.memory)
