"""What joins video frames, a page's text and demonstrations to a language model: TimeSuite, DocVLM
and AIM, each against loops in numpy.

Axes: B batch, N patches, M tokens that are left, W width of the tower, D width of the language
model, T tokens of text, K demonstrations.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import errors

from lib.cost import jaxpr
from lib.cost import projector as projector_cost
from models.backbones.images import Images
from models.backbones.lm import LM
from models.backbones.lm_block import Block
from models.checkpoints.compressors import from_release
from models.checkpoints.vlm_config import from_config
from models.demonstrations import AIM, Demonstrations
from models.projectors.base import Beside
from models.projectors.docvlm import DocVLM
from models.projectors.timesuite import TimeSuite
from models.stack import Stack
from ops.rope import Rope
from ops.splice import Visual, splice
from ops.tokens import TokenSet

W, D = 16, 6
CLIPS = (4, 1, 16)  # 64 tokens, joined 32, and two where they are fewest.
SHORT = TimeSuite(D, join=2, reach=4)
PUBLISHED = (16, 1, 96)


def gelu(x):
  return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def norm(x, scale, shift):
  x = x - x.mean(axis=-1, keepdims=True)
  return x / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + 1e-5) * scale + shift


def release(join=2, reach=4, width=W, wide=D):
  """Random tensors with the names and shapes of VideoChat-T's adapter."""
  narrow, rng = width // 4, np.random.default_rng(3)
  shapes = {'clip_proj': (width, width), 'merge_proj': (wide, join * width),
            'temp_adap.linear_input': (narrow, width), 'temp_adap.linear_output': (wide, narrow),
            'temp_adap.fc.0': (narrow, narrow, reach + 1)}
  for name, taps in (('DwConv1', 2 * join + 1), ('DwConv2', 2 * join + 1), ('UpConv1', join + 1),
                     ('UpConv0', join + 1)):
    shapes |= {f'temp_adap.{name}.0': (narrow, 1, taps), f'temp_adap.{name}.1': (narrow, narrow, 1)}
  tensors = {f'temp_adap.{name}.{part}': 1 + rng.normal(size=narrow) for name in
             ('fc.1', 'DwConv1.2', 'DwConv2.2', 'UpConv1.2', 'UpConv0.2')
             for part in ('weight', 'bias')}
  for name, shape in shapes.items():
    tensors |= {f'{name}.weight': rng.normal(size=shape) / math.sqrt(math.prod(shape[1:])),
                f'{name}.bias': rng.normal(size=shape[0])}
  return {name: value.astype(np.float32) for name, value in tensors.items()}


@functools.cache
def timesuite(module=SHORT, grid=CLIPS):
  tensors = release(module.join, module.reach)
  x = np.random.default_rng(4).normal(size=(2, math.prod(grid), W)).astype(np.float32)
  return from_release(module, tensors, grid=grid, width=W), tensors, x


@functools.partial(jax.jit, static_argnums=(0, 3))
def compress(module, params, x, grid=CLIPS):
  return module.apply({'params': params}, TokenSet.create(x), Beside(grid)).x


def convolved(x, weight, bias, stride):
  """Features [N, C] convolved by loops, zeros around; of one input an output has its own."""
  taps, (outputs, inputs, _) = weight.shape[2], weight.shape
  result = np.zeros((-(-len(x) // stride), outputs))
  for place in range(len(result)):
    for tap in range(taps):
      at = place * stride + tap - taps // 2
      if 0 <= at < len(x):
        read = x[at][:, None] if inputs == 1 else np.tile(x[at], (outputs, 1))
        result[place] += (read * weight[:, :, tap]).sum(axis=1)
  return result + bias


def added_by_loops(x, w, join):
  """Returns what the release's adapter adds to the tokens of one row [N, W]."""
  def of(name, part):
    return w[f'temp_adap.{name}.{part}'].astype(np.float64)

  def stage(name, x, stride):
    for number, step in ((0, stride), (1, 1)):
      x = convolved(x, of(f'{name}.{number}', 'weight'), of(f'{name}.{number}', 'bias'), step)
    return gelu(norm(x, of(f'{name}.2', 'weight'), of(f'{name}.2', 'bias')))

  x = x @ of('linear_input', 'weight').T + of('linear_input', 'bias')
  first = np.stack([x[at:at + join].mean(axis=0) for at in range(0, len(x), join)])
  second = stage('DwConv1', first, 4)
  third = convolved(stage('DwConv2', second, 4), of('fc.0', 'weight'), of('fc.0', 'bias'), 1)
  third = gelu(norm(third, of('fc.1', 'weight'), of('fc.1', 'bias')))
  second = stage('UpConv1', third[np.arange(len(second)) // 4] + second, 1)
  first = stage('UpConv0', second[np.arange(len(first)) // 4] + first, 1)
  return first @ of('linear_output', 'weight').T + of('linear_output', 'bias')


def test_timesuite_by_loops():
  params, w, x = timesuite()
  got = compress(SHORT, params, x)
  assert got.shape == (2, SHORT.slots(CLIPS), D)
  for row in range(2):
    own = x[row].astype(np.float64) @ w['clip_proj.weight'].T + w['clip_proj.bias']
    joined = own.reshape(-1, 2 * W) @ w['merge_proj.weight'].T + w['merge_proj.bias']
    np.testing.assert_allclose(got[row], joined + added_by_loops(own, w, 2), atol=2e-5)
    plain = compress(SHORT.clone(positions='none'),
                     {name: params[name] for name in ('tokens', 'joined')}, x)
    np.testing.assert_allclose(plain[row], joined, atol=1e-5)
  # A row is the row alone.
  np.testing.assert_allclose(compress(SHORT, params, x[1:])[0], got[1], atol=1e-6)


@pytest.mark.long
def test_an_image_keeps_its_tokens_as_timesuite_releases_it():
  params, w, x = timesuite()
  got = compress(SHORT, params, x, (8, 8))
  own = x[1] @ w['clip_proj.weight'].T + w['clip_proj.bias']
  want = np.concatenate([own, own], axis=1) @ w['merge_proj.weight'].T + w['merge_proj.bias']
  np.testing.assert_allclose(got[1], want, atol=1e-5)


@pytest.mark.long
def test_timesuite_begins_as_the_shuffle_alone_and_can_be_trained():
  x = jnp.asarray(timesuite()[2])
  params = SHORT.init(jax.random.key(0), TokenSet.create(x), Beside(CLIPS))['params']
  plain = {name: params[name] for name in ('tokens', 'joined')}
  np.testing.assert_array_equal(compress(SHORT, params, x),
                                compress(SHORT.clone(positions='none'), plain, x))
  trained = timesuite()[0]

  def loss(params, x, dtype):
    made = SHORT.clone(dtype=dtype).apply({'params': params}, TokenSet.create(x.astype(dtype)),
                                          Beside(CLIPS)).x
    assert made.dtype == dtype
    return jnp.sum(jnp.sin(made.astype(jnp.float32)))

  for dtype in (jnp.float32, jnp.bfloat16):
    found = jax.jit(jax.grad(loss, (0, 1)), static_argnums=2)(trained, x, dtype)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(found))


def test_timesuite_leaves_three_tokens_of_a_frame():
  module = TimeSuite(4096)
  assert module.slots(PUBLISHED) == 3 * 128
  assert module.grid_after(PUBLISHED) == (16, 1, 24)
  assert module.grid_after((32, 2, 3)) is None
  assert module.slots((32, 2, 3)) == 48
  assert module.slots((24, 24)) == 576


def test_products_of_timesuite_by_hand():
  width, wide, tokens, left, narrow = 768, 4096, 1536, 384, 192
  projected = tokens * width ** 2 + left * 4 * width * wide
  places = tokens * width * narrow + left * narrow * wide
  # Down to 96 and 24, a convolution of all features there, and up again.
  places += sum(length * narrow * (taps + narrow)
                for length, taps in ((96, 9), (24, 9), (96, 5), (384, 5)))
  places += 24 * 17 * narrow ** 2
  made = TimeSuite(wide)
  assert projector_cost.traced_macs(made, PUBLISHED, width) == projected + places
  assert projector_cost.traced_macs(made.clone(positions='none'), PUBLISHED, width) == projected


@pytest.mark.parametrize(('run', 'words'), [
    (lambda: TimeSuite(D, join=3), 'change them'),
    (lambda: TimeSuite(D, reach=15), 'change them'),
    (lambda: TimeSuite(D).slots((4, 3, 3)), 'a multiple of 64 tokens, and (4, 3, 3) has 36'),
    (lambda: TimeSuite(D, positions='none').grid_after((3, 3, 3)), 'a multiple of 4 tokens'),
    (lambda: TimeSuite(D, positions='sines'), 'choose one of adaptive, none')])
def test_what_timesuite_refuses(run, words):
  assert words in errors.said(run)


# A page's text.
T, E, QUERIES = 7, 16, 3
BLOCK = Block(E, 2, 2, 8, 24, Rope(8), mask='full', slots='any')
PAGE = np.arange(T) < np.array([[7], [4]])


@functools.cache
def reader(**more):
  module = DocVLM(D, Stack(BLOCK.clone(**more, parent=None), 2), queries=QUERIES, spread=0.5,
                  dtype=more.get('dtype', jnp.float32))
  x = jnp.asarray(np.random.default_rng(5).normal(size=(2, T, E)), jnp.float32)
  params = jax.jit(module.init)(jax.random.key(0), x, PAGE)['params']
  return module, jax.tree.map(lambda leaf: leaf * 6 if leaf.ndim > 2 else leaf, params), x


@functools.partial(jax.jit, static_argnums=0)
def read(module, params, x, valid):
  return module.apply({'params': params}, x, valid).x


@pytest.mark.long
def test_queries_read_a_page_inside_its_encoder():
  module, params, x = reader()
  got = read(module, params, x, PAGE)
  assert got.shape == (2, QUERIES, D)
  for row, length in enumerate((7, 4)):
    # The encoder over text and queries as over any tokens, one row without padding.
    whole = TokenSet.create(jnp.concatenate([x[row, :length], params['query']])[None])
    out, _ = Stack(BLOCK, 2).apply({'params': params['encoder']}, whole)
    want = np.array(out.x[0, -QUERIES:] @ params['projection']['kernel'])
    want += np.asarray(params['projection']['bias'])
    np.testing.assert_allclose(got[row], want, atol=2e-5)
  # Wherever padding is, and whatever it holds.
  left = jnp.concatenate([jnp.full((1, 3, E), 9.0), x[1:, :4]], axis=1)
  np.testing.assert_allclose(read(module, params, left, PAGE[1:, ::-1]), got[1:], atol=2e-5)
  moved = read(module, params, x.at[0, 2].add(1.0), PAGE)
  assert np.abs(moved - got)[0].max(axis=1).min() > 1e-3
  np.testing.assert_array_equal(moved[1], got[1])


@pytest.mark.long
def test_a_page_costs_its_encoder_and_as_many_tokens_as_queries():
  module, params, x = reader()
  slots = T + QUERIES
  layer = slots * (4 * E * 16 + 3 * E * 24) + 2 * slots ** 2 * 16
  found = jaxpr.count(module.apply, {'params': params}, x, PAGE)
  # Of the last layer all run, too.
  assert found.total == 2 * (2 * layer + QUERIES * E * D)
  published = DocVLM(4096, Stack(Block(768, 12, 12, 64, 2048, Rope(64), mask='full'), 12))
  shape = jax.eval_shape(published.init, jax.random.key(0), jnp.zeros((1, 800, 768)))['params']
  assert shape['query'].shape == (64, 768)
  out = jax.eval_shape(published.apply, {'params': shape}, jnp.zeros((1, 800, 768)))
  assert out.x.shape == (1, 64, 4096)


@pytest.mark.long
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_a_language_model_learns_to_read_pages_through_the_queries(dtype):
  """Gradients of the module alone, through a language model that stays as it is."""
  module, params, x = reader(dtype=dtype)
  lm = LM(vocabulary=11, width=D, depth=1, mlp=8, heads=1, kv_heads=1, head_width=D, context=32,
          rope=Rope(D), dtype=dtype)
  ids = jnp.asarray([[0, 1, 2], [0, 3, 4]])
  model = lm.init(jax.random.key(1), ids)

  def loss(params):
    page = module.apply({'params': params}, x.astype(dtype), PAGE)
    tokens, _ = splice(lm.apply(model, ids, method='embed').x, ids >= 0, ids == 0,
                       Visual(page.x[:, None]))
    assert tokens.slots == 3 + QUERIES
    return jnp.sum(jnp.sin(lm.apply(model, tokens)[0]))

  found = jax.jit(jax.grad(loss))(params)
  for leaf in jax.tree.leaves(found):
    assert np.isfinite(np.asarray(leaf, np.float32)).all()
  assert np.abs(found['query']).max() > 0


def test_a_causal_encoder_is_refused():
  assert "mask='full'" in errors.said(DocVLM, D, Stack(BLOCK.clone(mask='causal', parent=None), 1))


# Demonstrations.
IMAGE = 30
LLAVA = {'model_type': 'llava', 'image_token_id': IMAGE,
         'text_config': {'model_type': 'llama', 'vocab_size': 40, 'hidden_size': 16,
                         'intermediate_size': 24, 'num_hidden_layers': 2,
                         'num_attention_heads': 2, 'num_key_value_heads': 2},
         'vision_config': {'model_type': 'clip_vision_model', 'hidden_size': 16,
                           'intermediate_size': 24, 'num_hidden_layers': 3,
                           'num_attention_heads': 2, 'image_size': 16, 'patch_size': 4}}
# Two demonstrations of two rows, then a prompt with an image of its own; one is padded.
SHOWN = np.array([[[IMAGE, 1, 2, 3], [IMAGE, 4, 5, 0]], [[IMAGE, 6, 7, 8], [9, IMAGE, 2, 1]]])
SHOWN_VALID = np.array([[[1, 1, 1, 1], [1, 1, 1, 0]], [[1, 1, 1, 1], [1, 1, 1, 1]]], bool)
IDS = np.array([[IMAGE, IMAGE, IMAGE, 11, 12], [IMAGE, IMAGE, 13, IMAGE, 14]])


def pictures(rows, seed):
  return np.random.default_rng(seed).normal(size=(rows, 1, 16, 16, 3)).astype(np.float32)


def shown(rows=slice(None), images=None):
  images = pictures(4, 6) if images is None else images
  own = images.reshape(2, 2, *images.shape[1:])[rows].reshape(-1, *images.shape[1:])
  return Demonstrations(jnp.asarray(SHOWN[rows]), jnp.asarray(SHOWN_VALID[rows]), Images(own))


@functools.cache
def aim(layers=0):
  module = AIM(from_config(LLAVA), layers)
  inputs = jnp.asarray(IDS), jnp.ones(IDS.shape, bool), Images(pictures(2, 7))
  params = jax.jit(module.init)(jax.random.key(0), *inputs, shown())
  return module, params, inputs


@functools.cache
def program(module, **settings):
  return jax.jit(functools.partial(module.apply, **settings))


@pytest.mark.long
def test_demonstrations_are_what_the_model_makes_of_their_text():
  module, params, inputs = aim()
  params = jax.tree.map(lambda leaf: leaf, params)
  weight = np.random.default_rng(8).normal(size=(16, 16)).astype(np.float32)
  params['params']['projection']['kernel'] = jnp.asarray(weight)
  fused = program(module, method='aggregate')(params, shown())
  np.testing.assert_array_equal(fused.valid, SHOWN_VALID & (SHOWN != IMAGE))
  vlm = {'params': params['params']['vlm']}
  for row, number in np.ndindex(2, 2):
    real = SHOWN_VALID[row, number]
    ids = SHOWN[row, number][real][None]
    out, aux = module.vlm.apply(vlm, ids, np.ones(ids.shape, bool),
                                Images(pictures(4, 6)[2 * row + number][None]), method='read')
    text = np.flatnonzero(ids[0] != IMAGE)
    want = out.x[0, aux['slot'][0, text]] @ weight
    np.testing.assert_allclose(fused.x[row, number][fused.valid[row, number]], want, atol=2e-5)
  logits, out = program(module)(params, *inputs, shown())
  # 16 patches of one image, 6 or 7 tokens of demonstrations: their images are gone.
  assert out['sequence'].real.sum(axis=1).tolist() == [2 + 16 + 5, 2 + 16 + 6]
  sequence = out['sequence']
  first = np.asarray(sequence.x[0])[np.asarray(sequence.real[0])][:5]
  np.testing.assert_allclose(first, fused.x[0][fused.valid[0]], atol=1e-6)
  # A row is the row alone.
  alone = program(module)(params, *jax.tree.map(lambda leaf: leaf[1:], inputs), shown(slice(1, 2)))
  real = np.asarray(sequence.real[1])
  np.testing.assert_allclose(np.asarray(alone[0][0])[real], np.asarray(logits[1])[real], atol=2e-5)


@pytest.mark.long
def test_a_demonstration_knows_its_image_and_no_other():
  module, params, _ = aim()
  images = pictures(4, 6)
  images[1] += 1
  before, after = (program(module, method='aggregate')(params, each).x
                   for each in (shown(), shown(images=images)))
  moved = np.abs(before - after).max(axis=(2, 3))
  assert moved[0, 1] > 1e-4
  assert moved[0, 0] == moved[1, 0] == moved[1, 1] == 0


@pytest.mark.long
@pytest.mark.parametrize('layers', [1, 2])
def test_the_first_layers_may_read_demonstrations(layers):
  module, params, _ = aim(layers)
  got = program(module, method='aggregate')(params, shown())
  vlm = module.vlm
  tokens, aux = vlm.apply({'params': params['params']['vlm']}, *(
      x.reshape(4, 4) for x in (SHOWN, SHOWN_VALID)), Images(pictures(4, 6)), method='sequence')
  lm = vlm.lm.clone(capture=True)
  own = params['params']['vlm']['lm']
  hidden = lm.apply({'params': own}, tokens)[1]['hidden'][layers - 1]
  hidden = hidden / np.sqrt(np.square(hidden).mean(axis=2, keepdims=True) + lm.norm_eps)
  want = np.take_along_axis(np.asarray(hidden) * np.asarray(own['norm']['scale']),
                            np.minimum(aux['slot'], tokens.slots - 1)[..., None], axis=1)
  np.testing.assert_allclose(np.asarray(got.x)[np.asarray(got.valid)],
                             want.reshape(2, 2, 4, -1)[np.asarray(got.valid)], atol=2e-5)


@pytest.mark.long
def test_the_product_alone_learns_from_what_is_shown():
  module, params, inputs = aim()

  def total(params):
    return jnp.sum(jnp.sin(module.apply(params, shown(), method='aggregate').x))

  found = jax.jit(jax.grad(total))(params)['params']
  assert np.abs(found['projection']['kernel']).max() > 0
  assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(found['vlm']))
  found = jax.jit(jax.grad(lambda params: jnp.sum(jnp.sin(
      module.apply(params, *inputs, shown())[0]))))(params)['params']
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
  assert np.abs(found['projection']['kernel']).max() > 0


def test_what_aim_refuses():
  vlm = from_config(LLAVA)
  assert 'is more than the 2 of the language model' in errors.said(AIM, vlm, 3)
  assert "mask='frames'" in errors.said(AIM, vlm.clone(lm=vlm.lm.clone(mask='frames')))
