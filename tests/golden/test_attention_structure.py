"""What tokens of a prompt see, and where they stand, through whole models, against released code.

A model of one layer tells what a token sees: its output moves with that, and with nothing else.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import recorded
from helpers.tiny_lm import TINY, image_and_text, variables
from jax.experimental.pallas import tpu as pltpu

from models.backbones.lm import LM
from models.plan import make_plan
from ops.rope import Rope
from ops.tokens import TEXT, VISUAL, TokenSet


def load(name):
  return recorded.arrays(f'in_llm/{name}')


def seen_by(lm, tokens, variables, layer=0):
  """bool[N, N]: whether the output of a token (first axis) after a layer moves with another."""
  slots = tokens.slots
  one = np.random.default_rng(5).normal(size=lm.width) * np.eye(slots)[..., None]
  rows = jax.tree.map(lambda leaf: np.repeat(np.asarray(leaf), slots + 1, axis=0), tokens)
  rows.x[1:] += one.astype(np.float32)
  hidden = jax.jit(lm.clone(capture=True).apply)(variables, rows)[1]['hidden'][layer]
  hidden = np.asarray(hidden)
  return (np.abs(hidden[1:] - hidden[:1]).max(axis=2) > 1e-6).T


@pytest.mark.long
@pytest.mark.parametrize(('case', 'implementation'), [
    ('padded', 'xla'), *(pytest.param(*each, marks=pytest.mark.long) for each in (
        ('full', 'xla'), ('padded', 'splash')))])
def test_images_see_the_question(case, implementation):
  raw = load('aki_mma_mask')
  image, question, end = raw['img_start_text_start_text_end']
  slots = np.arange(24)
  kind = np.where((slots >= image) & (slots < question), VISUAL, TEXT).astype(np.int8)
  real = raw[f'attn2d_{case}'] == 1
  tokens = TokenSet.create(
      np.random.default_rng(2).normal(size=(1, 24, 16)).astype(np.float32), kind=kind[None],
      valid=real[None], stats={'question': ((slots >= question) & (slots < end))[None]})
  lm = TINY.clone(depth=1, mask='mutual', implementation=implementation)
  with pltpu.force_tpu_interpret_mode():
    seen = seen_by(lm, tokens, variables(1))
  np.testing.assert_array_equal(seen[real], (raw[f'mask_{case}'][0] == 1)[real])


@pytest.mark.long
def test_the_question_is_the_text_behind_the_image():
  tokens = image_and_text()
  seen = seen_by(TINY.clone(depth=1, mask='mutual'), tokens.replace(
      **{name: getattr(tokens, name)[:1] for name in ('x', 'pos', 'kind', 'owner')}), variables(1))
  want = np.tri(12, dtype=bool)
  want[2:8, 8:] = True
  np.testing.assert_array_equal(seen, want)


@pytest.mark.long
def test_a_layer_without_its_causal_mask_sees_everything():
  tokens = image_and_text()
  tokens = tokens.replace(
      **{name: getattr(tokens, name)[:1] for name in ('x', 'pos', 'kind', 'owner')},
      valid=jnp.arange(12)[None] < 9)
  lm = TINY.clone(full_layers=(1,))
  before, after = (seen_by(lm, tokens, variables(), layer)[:9] for layer in (0, 1))
  np.testing.assert_array_equal(before, np.tri(12, dtype=bool)[:9])
  np.testing.assert_array_equal(after, np.broadcast_to(np.arange(12) < 9, (9, 12)))


@pytest.mark.long
@pytest.mark.parametrize('stride', [
    64, *(pytest.param(stride, marks=pytest.mark.long) for stride in (1, 256))])
def test_visual_tokens_take_less_room(stride):
  """The keys in the cache are turned by the release's positions."""
  raw = load('v2pe_position_ids')
  ids = raw['input_ids']
  visual = (np.cumsum(ids == 1, axis=1) - np.cumsum(ids == 2, axis=1) > 0) & (ids != 1)
  lm = LM(vocabulary=8, width=8, depth=1, mlp=8, heads=2, kv_heads=1, head_width=8, context=800,
          rope=Rope(8))
  tokens = TokenSet.create(
      jnp.asarray(np.random.default_rng(0).normal(size=(1, 784, 8)), jnp.float32),
      kind=np.where(visual, VISUAL, TEXT).astype(np.int8))
  params = jax.jit(lm.init)(jax.random.key(1), np.zeros((1, 4), np.int32))
  near = lm.clone(visual_stride=stride)
  prefill = jax.jit(functools.partial(near.apply, room=1, method='prefill'))
  _, cache = prefill(params, tokens)
  plain = jax.jit(functools.partial(lm.apply, room=1, method='prefill'))(
      params, tokens.replace(pos=np.zeros((1, 784), np.int32)))[1]
  keys, turned = (np.asarray(part.layers[0].k)[:, 0, :784, None] for part in (plain, cache))
  want = jax.jit(lm.rope.rotate)(keys, raw[f'pos_stride{stride}'][None])
  np.testing.assert_allclose(turned, want, atol=1e-5)
  # The answer goes on from the next whole position.
  np.testing.assert_array_equal(
      cache.layers[0].start,
      [[784, 256 * (np.ceil(raw[f'pos_stride{stride}'].max()) + 1)]])


@pytest.mark.long
def test_decoding_goes_on_where_the_prompt_ended():
  """Three tokens, one by one, give what they give as part of the prompt."""
  lm = TINY.clone(visual_stride=96)
  tokens = image_and_text()
  prefill = jax.jit(functools.partial(lm.apply, room=4, method='prefill'))
  decode = jax.jit(functools.partial(lm.apply, method='decode'))
  _, cache = prefill(variables(), tokens)
  ids = jnp.asarray([[3, 1, 4]] * 3, jnp.int32)
  for step in range(3):
    logits, cache = decode(variables(), ids[:, step], cache)
  more = lm.apply(variables(), ids, method='embed')
  whole = TokenSet.create(
      jnp.concatenate([tokens.x, more.x], axis=1),
      kind=jnp.concatenate([tokens.kind, more.kind], axis=1))
  np.testing.assert_allclose(logits, prefill(variables(), whole)[0], atol=1e-5)


def merged(tokens):
  """The six visual tokens as two slots, of two and of four."""
  owner = np.array([0, 1, 2, 3, 2, 3, 3, 3, 4, 5, 6, 7])
  first = [int(np.argmax(owner == slot)) for slot in range(8)]
  last = [int(np.flatnonzero(owner == slot)[-1]) for slot in range(8)]
  small = tokens.replace(x=tokens.x[:, jnp.asarray(first)], kind=tokens.kind[:, jnp.asarray(first)],
                         pos=tokens.pos[:, jnp.asarray(last)], places=tokens.pos,
                         owner=jnp.broadcast_to(jnp.asarray(owner, jnp.int32), (3, 12)))
  return small, tokens.replace(x=small.x[:, owner])


@pytest.mark.long
def test_merged_tokens_are_seen_apart():
  """A layer's attention is the mean over copies at all positions, and the cache holds them all."""
  lm = TINY.clone(unmerging='virtual', capture=True)
  small, copies = merged(image_and_text())
  _, out = jax.jit(lm.apply)(variables(), small)
  block = lm.bind(variables()).stack.block
  tokens, owner = small, np.asarray(small.owner[0])
  for layer in range(3):
    params = {'params': jax.tree.map(lambda x, layer=layer: x[layer],
                                     variables()['params']['stack']['blocks'])}
    plain = block.clone(unmerging='none', parent=None)
    spread = copies.replace(x=tokens.x[:, owner])
    change, _ = plain.apply(params, spread, needs=frozenset(), proportional=False, method='attend')
    change = [np.asarray(change)[:, owner == slot].mean(axis=1) for slot in range(8)]
    tokens = tokens.replace(x=tokens.x + np.stack(change, axis=1))
    tokens = tokens.replace(
        x=tokens.x + plain.apply(params, tokens, method='feed_forward')[0])
    np.testing.assert_allclose(out['hidden'][layer], tokens.x, atol=1e-5)
  run = functools.partial(lm.clone(capture=False).apply, room=2, method='prefill')
  _, cache = jax.jit(run)(variables(), small)
  _, whole = jax.jit(functools.partial(TINY.apply, room=2, method='prefill'))(variables(), copies)
  np.testing.assert_allclose(cache.layers[0].k, whole.layers[0].k, atol=1e-5)
  np.testing.assert_array_equal(cache.layers[0].start, 12)


@pytest.mark.long
def test_features_are_added_where_their_tokens_are():
  """In layer 0 as to the input; behind a cut to what is left; to merged tokens their mean."""
  tokens = image_and_text()
  more = jax.random.normal(jax.random.key(8), tokens.x.shape)
  run = jax.jit(lambda lm, tokens: lm.clone(capture=True).apply(variables(), tokens),
                static_argnums=0)
  first = run(TINY, tokens.replace(added={0: more}))[0]
  np.testing.assert_allclose(first, run(TINY, tokens.replace(x=tokens.x + more))[0], atol=1e-5)
  for method in ('random', 'tome'):
    plan = make_plan({'method': method, 'token_kinds': 'visual', 'layers': 0, 'site': 'after',
                      'keep': 4}, TINY.host(12, visual=6))
    lm = TINY.clone(plan=plan)
    _, out = run(lm, tokens.replace(added={1: more}))
    cut = out['cuts'][0]
    share = np.asarray(cut.owner)[:, None] == np.arange(10)[None, :, None]
    mean = share @ np.asarray(more) / share.sum(axis=2, keepdims=True)
    block = TINY.bind(variables()).stack.block.clone(parent=None)
    layer = {'params': jax.tree.map(lambda p: p[1], variables()['params']['stack']['blocks'])}
    seen = cut.replace(x=cut.x + mean.astype(np.float32))
    change, _ = block.apply(layer, seen, needs=frozenset(), proportional=method == 'tome',
                            method='attend')
    seen = seen.replace(x=seen.x + change)
    want = seen.x + block.apply(layer, seen, method='feed_forward')[0]
    np.testing.assert_allclose(out['hidden'][1], want, atol=1e-5)
  with pytest.raises(ValueError, match='before layer 3: the layers are 0 to 2'):
    TINY.apply(variables(), tokens.replace(added={3: more}))


STRUCTURES = {'mutual': {'mask': 'mutual'}, 'full': {'full_layers': (1,)},
              'v2pe': {'visual_stride': 64}}
MERGE = {'method': 'tome', 'token_kinds': 'visual', 'layers': 1, 'keep': 3}


@pytest.mark.long
@pytest.mark.parametrize(('structure', 'pad'), [
    *((structure, 'left') for structure in STRUCTURES), ('apart', 'left'), ('all', 'left'),
    ('all', 'right')])
def test_a_row_of_a_batch_equals_the_row_alone(structure, pad):
  """With padding on either side, for the prompt and for what is decoded after it."""
  lm, small = TINY, TINY
  if structure == 'apart':
    lm = TINY.clone(unmerging='virtual')
    small = lm.clone(plan=make_plan(MERGE, lm.host(12, visual=6)))
    lm = lm.clone(plan=make_plan(MERGE, lm.host(15, visual=6)))
  else:
    for name in STRUCTURES if structure == 'all' else (structure,):
      lm = small = lm.clone(**STRUCTURES[name])
  whole = image_and_text()
  prefill = jax.jit(lambda lm, *args: lm.apply(*args, room=1, method='prefill'), static_argnums=0)
  decode = jax.jit(functools.partial(lm.apply, method='decode'))
  alone = whole.replace(**{name: getattr(whole, name)[:1, :] for name in ('x', 'pos', 'kind',
                                                                          'owner')})
  width = ((0, 0), (3, 0) if pad == 'left' else (0, 3))
  valid = jnp.pad(jnp.ones((1, 12), bool), width)
  padded = TokenSet.create(
      jnp.pad(alone.x, (*width, (0, 0)), constant_values=9.0),
      pos=jnp.pad(alone.pos, width), kind=jnp.pad(alone.kind, width, constant_values=TEXT),
      valid=valid, padding='last' if pad == 'right' else 'anywhere')
  token = jnp.asarray([3], jnp.int32)
  (want, one), (got, other) = prefill(small, variables(), alone), prefill(lm, variables(), padded)
  np.testing.assert_allclose(got, want, atol=1e-5)
  np.testing.assert_allclose(decode(variables(), token, other)[0],
                             decode(variables(), token, one)[0], atol=1e-5)


@pytest.mark.parametrize(('more', 'message'), [
    ({'mask': 'prefix'}, "mask='prefix'"),
    ({'visual_stride': 300}, 'visual_stride=300 must be in 1 to 256, or 0'),
    ({'visual_stride': 4, 'rope': Rope(8, sections=(2, 1, 1))}, 'is for one position a token'),
    ({'unmerging': 'virtual', 'mask': 'mutual'}, "leave mask='mutual' out, or set unmerging="),
    ({'full_layers': (0, 3)}, 'full_layers names layer 3, and the model has layers 0 to 2')])
def test_structures_that_cannot_be(more, message):
  with pytest.raises(ValueError, match=message):
    TINY.clone(**more)
