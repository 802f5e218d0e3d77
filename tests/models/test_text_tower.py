"""Text towers: causality by position, reductions, what is pooled, and errors."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import mostly_long

from models.backbones.clip import Clip, make_clip
from models.backbones.text_tower import Text
from models.backbones.vit import Block, ViT
from models.plan import make_plan
from ops import attention
from ops.tokens import TokenSet

EOT = 10
CAUSAL = Text(width=16, depth=3, mlp=24, heads=2, vocabulary=EOT + 1, context=12, projection=6,
              causal=True, pool='eot', capture=True)
WHOLE = CAUSAL.clone(causal=False, pool='last', projection_bias=True)
ENDS = (11, 8, 6)


@functools.cache
def ids():
  made = np.random.default_rng(0).integers(0, EOT, (3, 12)).astype(np.int32)
  made[np.arange(3), ENDS] = EOT
  return jnp.asarray(made)


@functools.cache
def params(text):
  return jax.jit(text.init)(jax.random.key(0), ids())


def run(text, tokens=None):
  return jax.jit(text.apply)(params(text.clone(plan=None)), ids() if tokens is None else tokens)


def planned(text, **reduction):
  return text.clone(plan=make_plan({'layers': (1, 2), 'remove': 2, **reduction}, text.host))


@pytest.mark.long
def test_later_tokens_change_nothing_before_them():
  hidden = run(CAUSAL)[1]['hidden']
  changed = ids().at[:, 5].set((ids()[:, 5] + 1) % EOT)
  again = run(CAUSAL, changed)[1]['hidden']
  for before, after in zip(hidden, again, strict=True):
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert (np.abs(before[:, 5:7] - after[:, 5:7]).max(axis=(1, 2)) > 1e-4).all()


@pytest.mark.long
def test_padding_after_the_end_changes_nothing():
  padded = jnp.where(jnp.arange(12)[None] > jnp.asarray(ENDS)[:, None], 3, ids())
  np.testing.assert_array_equal(run(CAUSAL)[0], run(CAUSAL, padded)[0])
  # SigLIP attends to its padding.
  assert np.abs(run(WHOLE)[0] - run(WHOLE, padded)[0])[1:].max() > 1e-3


@pytest.mark.parametrize('needs', mostly_long(
    [frozenset(), frozenset({'received_attention', 'cls_attention'})]))
def test_causality_follows_positions_not_slots(needs):
  block = Block(16, 2, 24, causal=True)
  x = jax.random.normal(jax.random.key(1), (2, 7, 16))
  pos = jnp.stack([jnp.arange(7), jnp.asarray([0, 2, 3, 5, 8, 9, 11])]).astype(jnp.int32)
  tokens = TokenSet.create(x, pos=pos)
  weights = jax.jit(block.init)(jax.random.key(0), tokens)

  @jax.jit
  def attend(tokens):
    return block.apply(weights, tokens, needs=needs, proportional=False, method='attend')

  order = jnp.asarray([0, 4, 2, 6, 1, 5, 3])  # [CLS] rows are those of slot 0.
  straight, signals = attend(tokens)
  shuffled, moved = attend(tokens.replace(x=x[:, order], pos=pos[:, order]))
  np.testing.assert_allclose(shuffled, straight[:, order], atol=1e-6)
  for name in needs:
    np.testing.assert_allclose(getattr(moved, name), getattr(signals, name)[..., order], atol=1e-6)
  if needs:
    # The first sees itself alone; the last is seen by itself alone.
    np.testing.assert_array_equal(signals.cls_attention[..., 1:], 0.0)
    assert float(signals.received_attention[..., -1].max()) < 1 / 7


def test_attention_by_positions_equals_attention_by_slots_when_they_are_in_order():
  q, k, v = np.random.default_rng(2).normal(size=(3, 2, 6, 2, 8)).astype(np.float32)
  bias = np.zeros((2, 6), np.float32)
  bias[1, 2] = -np.inf
  positions = 3 * np.arange(6, dtype=np.int32)[None].repeat(2, axis=0)

  @functools.partial(jax.jit, static_argnames='causal')
  def run(q, k, v, **order):
    found = attention.attend(q, k, v, bias=bias, **order)
    return (found, attention.received(q, k, found.lse, bias=bias, chunk=4, **order),
            attention.eager(q, k, bias=bias, **order))

  chex.assert_trees_all_close(run(q, k, v, positions=positions), run(q, k, v, causal=True),
                              rtol=1e-7, atol=1e-6)


@pytest.mark.long
@pytest.mark.parametrize('method', ['tome', 'pitome', 'random'])
def test_reduced_causal_towers_see_nothing_later(method):
  text = planned(CAUSAL, method=method, site='between')
  # Every token has a row of the table of its own, so that the gradient tells which were seen.
  single = jnp.arange(12, dtype=jnp.int32)[None]
  tower = text.clone(vocabulary=12)
  table, rest = jax.random.normal(jax.random.key(3), (12, 16)), params(CAUSAL)['params']

  @jax.jit
  def seen(table):
    def numbers(table):
      _, out = tower.apply({'params': rest | {'table': table}}, single)
      weight = jax.random.normal(jax.random.key(4), (16,))
      return jnp.einsum('nd,d->n', out['tokens'].x[0], weight), out['tokens']

    return jax.jacrev(numbers, has_aux=True)(table)

  jacobian, tokens = seen(table)
  reach = np.abs(jacobian).max(-1) > 1e-7  # [M, T]
  assert tokens.slots == 8
  later = np.arange(12)[None] > np.asarray(tokens.pos[0])[:, None]
  assert not (reach & later).any()
  # The last one sees all that was not dropped, so the gradient does find what is seen.
  last = int(np.argmax(tokens.pos[0]))
  assert reach[last][np.asarray(tokens.owner[0]) >= 0].all()


@pytest.mark.long
@pytest.mark.parametrize('method', ['tome', 'random', 'pitome', 'kmedoids', 'mctf'])
@pytest.mark.parametrize('text', [CAUSAL, WHOLE], ids=['eot', 'last'])
def test_what_is_pooled_outlives_any_reduction(text, method):
  reduced = planned(text, method=method, site='between')
  features, out = run(reduced)
  tokens = out['tokens']
  slot = np.asarray(tokens.owner)[np.arange(3), ENDS if text.causal else (11,) * 3]
  assert (slot >= 0).all()
  np.testing.assert_array_equal(tokens.pos[np.arange(3), slot],
                                np.asarray(ENDS if text.causal else (11,) * 3))
  np.testing.assert_array_equal(out['pooled'], tokens.x[np.arange(3), slot])
  assert features.shape == (3, 6)
  assert tokens.slots == reduced.plan.events[-1].slots_out < 12
  # Each text loses what it would lose alone.
  lengths = np.asarray(ENDS) + 1 if text.causal else np.full(3, 12)
  plans = [make_plan({'layers': (1, 2), 'remove': 2, 'method': method, 'site': 'between'},
                     dataclasses.replace(text.host, slots=int(length))) for length in lengths]
  np.testing.assert_array_equal(tokens.real.sum(1), [
      plan.events[-1].slots_out if plan.events else length
      for plan, length in zip(plans, lengths, strict=True)])


def test_keeping_everything_changes_nothing():
  whole = run(CAUSAL)[0]
  np.testing.assert_allclose(run(planned(CAUSAL, method='tome', remove=None, keep_ratio=1.0))[0],
                             whole, atol=1e-6)


@pytest.mark.parametrize(('settings', 'message'), [
    ({'method': 'mctf', 'site': 'inside'}, "set site='between'"),
    ({'method': 'patchmerger'}, 'causal attention would see later ones'),
    ({'method': 'expedit'}, 'choose a method that reads one of these'),
])
def test_what_causal_towers_cannot_do_is_a_one_line_error(settings, message):
  with pytest.raises(ValueError, match=message) as caught:
    jax.eval_shape(planned(CAUSAL, **settings).init, jax.random.key(0), ids())
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize(('text', 'tokens', 'message'), [
    (CAUSAL, jnp.zeros((2, 9), jnp.int32), r'expected integers \[batch, 12\]'),
    (CAUSAL, jnp.zeros((2, 12)), 'dtype float32 do not fit'),
])
def test_wrong_ids_are_errors(text, tokens, message):
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(text.init, jax.random.key(0), tokens)


@pytest.mark.parametrize(('setting', 'message'), [
    ({'pool': 'first'}, 'choose one of eot, last'),
    ({'activation': 'relu'}, 'gelu, gelu_tanh, quick_gelu, swiglu')])
def test_wrong_settings_are_errors(setting, message):
  with pytest.raises(ValueError, match=message):
    CAUSAL.clone(**setting)


@pytest.mark.long
def test_a_pair_scores_by_cosine_and_reduces_either_tower():
  vit = ViT(width=16, depth=2, mlp=24, heads=2, patch=4, image_size=16, num_classes=0,
            class_token=False, pool='map', projection=6)
  pair = Clip(vit, CAUSAL.clone(depth=2), bias=True)
  images = jax.random.normal(jax.random.key(0), (2, 16, 16, 3))
  weights = jax.jit(pair.init)(jax.random.key(1), images, ids())
  logits, out = jax.jit(pair.apply)(weights, images, ids())
  cosine = out['image_features'] @ out['text_features'].T
  np.testing.assert_allclose(np.linalg.norm(out['image_features'], axis=1), 1.0, atol=1e-5)
  np.testing.assert_allclose(logits, 10.0 * cosine - 10.0, atol=1e-4)

  @jax.jit
  def in_turn(weights):
    texts = pair.apply(weights, ids(), method='encode_text')
    return pair.apply(weights, images, texts, method='classify')

  np.testing.assert_allclose(in_turn(weights), logits, atol=1e-4)
  cut = pair.clone(image=vit.clone(plan=make_plan({'method': 'tome', 'layers': (1,), 'remove': 6},
                                                  vit.host)))
  reduced, out = jax.eval_shape(cut.apply, weights, images, ids())
  assert reduced.shape == logits.shape
  assert out['image']['tokens'].slots == 10
  with pytest.raises(ValueError, match="did you mean 'clip_b32'"):
    make_clip('clip_b33')
