"""Visual tokens that see themselves alone, or their whole frame: masks, positions, and what is cut.

Axes: B batch, N slots, D width, H heads, K kv heads, d features a head.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import errors, mostly_long, parity_vlm
from helpers.tiny_lm import PROMPT, TINY, VALID, VISUALS, image_and_text, planned, variables
from jax.experimental.pallas import tpu as pltpu

from models.backbones.images import Images
from models.checkpoints.vlm_config import from_config
from models.reduce_config import with_plans
from ops.masks import FRAME, frames_begun
from ops.rope import Rope
from ops.tokens import SPECIAL, TEXT, VISUAL, TokenSet

TEXTS, STRIDE = PROMPT - VISUALS, 3
# Two tokens of text, frames of 2, 3 and 1 tokens, and text.
FRAMES = np.array([-1, -1, 0, 0, 1, 1, 1, 4, -1, -1, -1, -1])


def prompt(valid=None, **more):
  """A row's text, three frames, and text."""
  tokens = image_and_text(valid)
  return tokens.replace(stats={FRAME: jnp.asarray(np.tile(FRAMES, (3, 1)))}, **more)


@functools.cache
def strong():
  """Parameters by which tokens look at few others."""
  params = variables()['params']
  blocks = jax.tree.map(lambda leaf: leaf * 2 if leaf.ndim > 2 else leaf, params['stack']['blocks'])
  return {'params': params | {'stack': {'blocks': blocks}}}


@functools.cache
def program(lm, **settings):
  return jax.jit(functools.partial(lm.apply, **settings))


def composite_by_loops(kind, frame):
  """bool[N, N] of one row without padding."""
  del frame
  slots = range(len(kind))
  return np.array([[j == i if kind[i] != TEXT else j <= i for j in slots] for i in slots])


def frames_by_loops(kind, frame):
  """bool[N, N] of one row without padding."""
  del kind
  slots = range(len(frame))
  return np.array([[j <= i or (frame[i] == frame[j] >= 0) for j in slots] for i in slots])


def turned(x, pos):
  """Features [N, H, d] turned by positions [N]."""
  half = x.shape[2] // 2
  angles = pos[:, None, None] * 10000.0 ** (-np.arange(half) / half)
  first, second = x[..., :half], x[..., half:]
  return np.concatenate([first * np.cos(angles) - second * np.sin(angles),
                         second * np.cos(angles) + first * np.sin(angles)], axis=2)


def norm(x, scale):
  return x / np.sqrt(np.square(x).mean(axis=1, keepdims=True) + 1e-5) * scale


def reference(lm, params, x, seen, pos):
  """float64[N, V], logits of one row of embeddings, by how often each token counts for each,
  [N, N], and positions."""
  params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
  for layer in range(lm.depth):
    own = jax.tree.map(lambda leaf, layer=layer: leaf[layer], params['stack']['blocks'])
    hidden = norm(x, own['norm1']['scale'])
    q, k, v = (np.einsum('nd,dhe->nhe', hidden, own[name]['kernel']) for name in 'qkv')
    q, k = turned(q, pos), turned(k, pos)
    k, v = (np.repeat(each, lm.heads // lm.kv_heads, axis=1) for each in (k, v))
    logits = np.einsum('nhe,she->hns', q, k) / np.sqrt(lm.head_width)
    weights = np.exp(logits - logits.max()) * seen
    weights /= weights.sum(axis=2, keepdims=True)
    x = x + np.einsum('hns,she,hed->nd', weights, v, own['out']['kernel'])
    hidden = norm(x, own['norm2']['scale'])
    gate = hidden @ own['gate']['kernel']
    x = x + (gate / (1 + np.exp(-gate)) * (hidden @ own['up']['kernel'])) @ own['down']['kernel']
  return norm(x, params['norm']['scale']) @ params['head']['kernel']


LOOPS = {'composite': composite_by_loops, 'frames': frames_by_loops}
# How each runs: 'by text' makes no queries of other tokens.
WAYS = {'composite': {}, 'by text': {'texts': TEXTS}, 'frames': {}}


@functools.cache
def model(way, **settings):
  return TINY.clone(mask='composite' if way == 'by text' else way, **settings)


@pytest.mark.long
@pytest.mark.parametrize('way', WAYS)
def test_whole_models_are_those_of_a_map_by_loops(way):
  lm, tokens = model(way), prompt(**WAYS[way])
  logits = program(lm)(strong(), tokens)[0]
  for row in range(3):
    want = reference(lm, strong()['params'], np.asarray(tokens.x[row], np.float64),
                     LOOPS[lm.mask](tokens.kind[row], FRAMES), np.arange(PROMPT))
    np.testing.assert_allclose(logits[row], want, atol=2e-5)
  causal = program(TINY)(strong(), tokens)[0]
  assert np.abs(causal - logits)[:, 3].max() > 1e-3


@pytest.mark.long
@pytest.mark.parametrize('way', ['by text', 'composite', 'frames'])
def test_a_padded_row_is_the_row_alone_in_prompt_and_answer(way):
  tokens, lm = prompt(VALID, **WAYS[way]), model(way)
  prefill, decode = program(lm, room=2, method='prefill'), program(lm, method='decode')
  together = prefill(strong(), tokens)
  ids = jnp.asarray([3, 3, 3], jnp.int32)
  after = decode(strong(), ids, together[1])[0]
  for row in range(3):
    real = np.flatnonzero(VALID[row])
    alone = TokenSet.create(
        tokens.x[row, real][None], kind=tokens.kind[row, real][None],
        stats={FRAME: tokens.stats[FRAME][row, real][None]},
        texts=int((np.asarray(tokens.kind)[row, real] == TEXT).sum()) if tokens.texts else None)
    logits, cache = prefill(strong(), alone)
    np.testing.assert_allclose(together[0][row], logits[0], atol=1e-5)
    np.testing.assert_allclose(after[row], decode(strong(), ids[:1], cache)[0][0], atol=1e-5)


@pytest.mark.parametrize(('way', 'stride'), mostly_long(
    [('by text', 0), ('frames', STRIDE), ('composite', 0), ('frames', 0)], short=2))
def test_an_answer_is_what_the_whole_pass_says(way, stride):
  lm = model(way, frame_stride=stride)
  tokens, answer = prompt(**WAYS[way]), np.array([[5, 7], [1, 2], [9, 3]])
  logits, cache = program(lm, room=2, method='prefill')(strong(), tokens)
  told = [logits]
  for step in range(2):
    logits, cache = program(lm, method='decode')(strong(), answer[:, step], cache)
    told.append(logits)
  behind = program(lm, method='embed')(strong(), answer)
  whole = TokenSet.create(
      jnp.concatenate([tokens.x, behind.x], axis=1),
      kind=jnp.concatenate([tokens.kind, behind.kind], axis=1),
      stats={FRAME: jnp.pad(tokens.stats[FRAME], ((0, 0), (0, 2)), constant_values=-1)},
      texts=None if tokens.texts is None else TEXTS + 2)
  np.testing.assert_allclose(np.stack(told, axis=1),
                             program(lm)(strong(), whole)[0][:, -3:], atol=2e-5)


@pytest.mark.long
@pytest.mark.parametrize('way', ['by text', 'frames'])
def test_gradients_are_finite_and_so_is_bfloat16(way):
  tokens = prompt(VALID, **WAYS[way])

  def loss(params, x, dtype):
    logits, _ = model(way, dtype=dtype).apply(params, tokens.replace(x=x))
    return jnp.sum(jnp.where(jnp.asarray(VALID)[..., None], jnp.sin(logits), 0))

  gradient = jax.jit(jax.grad(loss, (0, 1)), static_argnums=2)
  for dtype in (jnp.float32, jnp.bfloat16):
    found = gradient(strong(), tokens.x, dtype)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
  # Text reads every visual token.
  found = gradient(strong(), tokens.x, jnp.float32)[1]
  assert np.abs(found[0, 2:8]).max(axis=1).min() > 1e-4


@pytest.mark.long
def test_queries_of_text_alone_change_nothing():
  """Gradients, signals of all tokens, and reductions that go by them."""
  tokens = prompt(VALID)
  lm = planned(model('composite'), method='fastv')

  def loss(params, tokens):
    logits, out = lm.apply(params, tokens)
    return jnp.sum(jnp.sin(logits) * out['tokens'].real[..., None]), out['tokens'].owner

  run = jax.jit(jax.grad(loss, has_aux=True))
  (want, kept), (got, others) = (run(strong(), tokens.replace(texts=texts))
                                 for texts in (None, TEXTS))
  np.testing.assert_array_equal(others, kept)
  for one, two in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(one, two, atol=2e-5)


@pytest.mark.parametrize('implementation', ['splash'])
@pytest.mark.long
def test_a_kernel_lets_tokens_see_themselves_alone(implementation):
  tokens = prompt(VALID)
  want = program(model('composite'))(strong(), tokens)[0]
  with pltpu.force_tpu_interpret_mode():
    got = program(model('composite', implementation=implementation))(strong(), tokens)[0]
  np.testing.assert_allclose(got[VALID], want[VALID], atol=2e-5)


@pytest.mark.long
@pytest.mark.parametrize('method', ['tome', 'random'])
@pytest.mark.parametrize('way', ['frames', 'by text'])
def test_a_cut_leaves_the_mask_of_what_is_left(way, method):
  """Compares the layers behind a cut with a map by loops over the tokens that are left."""
  lm = planned(model(way, capture=True), method=method, site='before', layers=1, keep=4)
  tokens = prompt(**WAYS[way])
  logits, out = program(lm)(strong(), tokens)
  left = out['cuts'][1]
  assert left.slots == PROMPT - 2
  own = lm.clone(depth=2, plan=None, capture=False)
  params = strong()['params'] | {'stack': {'blocks': jax.tree.map(
      lambda leaf: leaf[1:], strong()['params']['stack']['blocks'])}}
  for row in range(3):
    seen = LOOPS[lm.mask](left.kind[row], np.asarray(left.stats[FRAME][row]))
    want = reference(own, params, np.asarray(left.x[row], np.float64),
                     seen * np.asarray(left.sizes[row]), np.asarray(left.pos[row]))
    np.testing.assert_allclose(logits[row], want, atol=2e-5)


def test_frames_turn_by_their_place_and_their_number():
  lm, tokens = TINY.clone(frame_stride=STRIDE), prompt()
  pos = np.arange(PROMPT) + STRIDE * np.array([0, 0, 1, 1, 2, 2, 2, 3, 3, 3, 3, 3])
  want = reference(lm, strong()['params'], np.asarray(tokens.x[0], np.float64),
                   np.tri(PROMPT, dtype=bool), pos)
  np.testing.assert_allclose(program(lm)(strong(), tokens)[0][0], want, atol=2e-5)
  # Among text alone, and in a frame, nothing is another than without.
  ids = np.arange(8)[None]
  np.testing.assert_allclose(program(lm)(strong(), ids)[0], program(TINY)(strong(), ids)[0],
                             atol=1e-6)


def test_frames_that_have_begun():
  frame = np.array([[-1, 0, 0, -1, 3, 3, -1, 4], [2, 2, -1, -1, -1, 7, 7, -1]])
  np.testing.assert_array_equal(frames_begun(jnp.asarray(frame)),
                                [[0, 1, 1, 1, 2, 2, 2, 3], [1, 1, 1, 1, 1, 2, 2, 2]])


def test_a_frame_is_an_image_and_else_all_visual_tokens():
  tokens = prompt()
  lm = model('frames')
  own = program(lm)(strong(), tokens)[0]
  group = program(lm)(strong(), tokens.replace(stats={'group': tokens.stats[FRAME]}))[0]
  np.testing.assert_array_equal(own, group)
  whole = program(lm)(strong(), tokens.replace(stats={}))[0]
  one = np.where(np.asarray(tokens.kind) == VISUAL, 0, -1)
  np.testing.assert_array_equal(
      whole, program(lm)(strong(), tokens.replace(stats={FRAME: jnp.asarray(one)}))[0])
  assert np.abs(whole - own).max() > 1e-3


def test_what_ends_a_row_is_no_text():
  tokens = prompt(texts=TEXTS)
  kind = np.asarray(tokens.kind).copy()
  kind[:, 4] = SPECIAL
  got = program(model('by text'))(strong(), tokens.replace(kind=jnp.asarray(kind)))[0]
  np.testing.assert_array_equal(got, program(model('by text'))(strong(), tokens)[0])


@functools.cache
def video():
  """A model, its parameters, and a row's video of three frames, of which two are one image."""
  vlm = from_config(parity_vlm.config_of('llava'), grid=parity_vlm.GRID)
  random, side = np.random.default_rng(0), vlm.tower.image_size
  each = vlm.passed_on[0]
  index = np.stack([np.arange(2 * each), np.r_[2 * each:3 * each, np.zeros(each, int)]])[None]
  weight = np.ones(index.shape, np.float32)
  weight[0, 1, each:] = 0
  images = Images(random.normal(size=(1, 3, side, side, 3)).astype(np.float32),
                  index=index[..., None].astype(np.int32), weight=weight[..., None])
  ids = np.array([[1, vlm.image_token, 2, vlm.image_token, 3]])
  params = jax.jit(vlm.init)(jax.random.key(0), ids, ids >= 0, images)
  return vlm, params, ids, images, each


@pytest.mark.long
@pytest.mark.parametrize('cut', ['none', 'projector'])
def test_crops_of_an_image_are_frames(cut):
  vlm, params, ids, images, each = video()
  vlm = vlm.clone(lm=vlm.lm.clone(mask='frames'))
  kept = each if cut == 'none' else 0
  if cut == 'projector':
    vlm = with_plans(vlm, projector={'method': 'random', 'keep': 5})(5, images.layout)
  _, out = program(vlm)(params, ids, ids >= 0, images)
  tokens = out['sequence']
  frame = np.asarray(tokens.stats[FRAME][0])[np.asarray(tokens.real[0])]
  text = np.asarray(tokens.kind[0])[np.asarray(tokens.real[0])] == TEXT
  np.testing.assert_array_equal(frame[text], -1)
  if kept:
    np.testing.assert_array_equal(frame[~text], np.repeat([0, 1, 3], each))
  else:
    assert len(frame) == 3 + 10
    assert set(frame[~text]) == {0, 1, 3}
    assert list(frame[~text]) == sorted(frame[~text])


@pytest.mark.long
def test_a_vlm_says_how_much_text_there_is():
  vlm, params, ids, images, _ = video()
  vlm = vlm.clone(lm=vlm.lm.clone(mask='composite'))
  logits, out = program(vlm)(params, ids, ids >= 0, images)
  assert out['sequence'].texts == 5
  slow = program(vlm.lm)({'params': params['params']['lm']}, out['sequence'].replace(texts=None))[0]
  real = np.asarray(out['sequence'].real)
  np.testing.assert_allclose(logits[real], slow[real], atol=1e-5)


@pytest.mark.parametrize(('settings', 'words'), [
    ({'mask': 'frame'}, "mask='frame'"),
    ({'frame_stride': 2, 'visual_stride': 4}, 'leave visual_stride and rope.sections out'),
    ({'frame_stride': 2, 'rope': Rope(8, sections=(2, 1, 1))}, 'is for one whole position'),
    ({'mask': 'composite', 'unmerging': 'virtual'}, "leave mask='composite' out"),
    ({'frame_stride': 2, 'unmerging': 'virtual'}, 'leave frame_stride=2 out')])
def test_what_cannot_be_is_said_in_a_line(settings, words):
  said = errors.said(TINY.clone, **settings)
  assert words in said
  assert '\n' not in said


@pytest.mark.parametrize('mask', ['composite', 'frames'])
def test_who_chooses_pairs_is_refused_beside_these_masks(mask):
  core = planned(method='token_sparse_attention', token_kinds=('visual', 'text'), keep=(9, 6),
                 args={'window': 4})
  assert f"so does mask='{mask}'" in errors.said(core.clone, mask=mask)
  cache = TINY.apply(strong(), 3, 8, method='empty_cache')
  with pytest.raises(ValueError, match=f"a model with mask='{mask}' reads no chunks"):
    TINY.clone(mask=mask).apply(strong(), jnp.zeros((3, 4), jnp.int32), cache, method='extend')
