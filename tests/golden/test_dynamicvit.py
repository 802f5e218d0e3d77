"""DynamicViT in training and its distillation: what no released output shows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import golden_vit
from helpers.golden_vit import arrays

from lib.tasks.distill import distill, logit_loss, token_loss
from models.backbones.vit import Block
from models.blocks import add
from models.compressors.dynamicvit import DynamicViT, decide
from models.plan import make_plan
from ops import tokens as tk
from ops.signals import Signals
from ops.tokens import TokenSet

KEY = jax.random.key(7)
# Its parameters depend on the width alone.
INIT = jax.jit(functools.partial(DynamicViT().init, signals=Signals(), num_slots=3))
TOKEN_LOSS, LOGIT_LOSS = jax.jit(token_loss), jax.jit(logit_loss)


def tiny(keep, layers=(1,), **args):
  model = golden_vit.model()
  return model.clone(plan=make_plan({'method': 'dynamicvit', 'args': args, 'layers': layers,
                                     'keep': keep}, model.host))


@functools.cache
def start(keep=32, layers=(1,)):
  """A model, and the tiny ViT's weights with fresh predictors."""
  some = TokenSet.create(np.zeros((1, 4, golden_vit.WIDTH), np.float32))
  fresh = {f'reducer_{layer:02d}': arrays(INIT(jax.random.key(layer), some)['params'])
           for layer in layers}
  return tiny(keep, layers), golden_vit.params() | {'stack': fresh | golden_vit.params()['stack']}


@functools.partial(jax.jit, static_argnums=0)
def train(model, params, images):
  return jax.jit(model.apply)({'params': params}, images, rngs={'dropout': KEY})


@functools.partial(jax.jit, static_argnums=0)
def evaluate(model, params, images):
  return jax.jit(model.apply)({'params': params}, images)


@pytest.mark.long
def test_training_keeps_all_slots_with_sizes_zero_and_one():
  model, params = start((32, 16), (1, 2))
  _, out = train(model, params, golden_vit.images())
  sizes = {layer: np.asarray(cut.size) for layer, cut in out['cuts'].items()}
  for layer in (1, 2):
    assert sizes[layer].shape == (2, 65)
    assert set(np.unique(sizes[layer])) == {0.0, 1.0}
    np.testing.assert_array_equal(sizes[layer][:, 0], 1.0)
  # What is dropped stays dropped.
  assert np.all(sizes[2] <= sizes[1])
  assert np.any(sizes[2] < sizes[1])


@pytest.mark.long
def test_evaluation_keeps_the_budget_and_says_nothing_of_sizes():
  model, params = start((32, 16), (1, 2))
  _, out = evaluate(model, params, golden_vit.images())
  assert [out['cuts'][layer].slots for layer in (1, 2)] == [33, 17]
  assert out['tokens'].size is None
  assert out['losses'] == {}


def test_decisions_are_exact_and_as_likely_as_predicted():
  keep = np.linspace(0.01, 0.99, 9, dtype=np.float32)
  scores = np.log(np.stack([keep, 1 - keep], axis=-1))
  sampled = np.asarray(jax.jit(decide)(np.broadcast_to(scores, (4000, 9, 2)), KEY))
  assert set(np.unique(sampled)) == {0.0, 1.0}
  # Four standard deviations of a mean of 4,000 draws.
  np.testing.assert_array_less(np.abs(np.mean(sampled, axis=0) - keep),
                               4 * np.sqrt(keep * (1 - keep) / 4000))


@pytest.mark.long
def test_rows_draw_noise_of_their_own():
  tokens = TokenSet.create(np.zeros((2, 64, 8), np.float32))
  call = jax.jit(functools.partial(DynamicViT().apply, num_slots=32))
  answer = call(INIT(KEY, tokens), tokens, Signals(), rngs={'dropout': KEY})
  policy = np.asarray(answer.policy)
  assert np.any(policy[0] != policy[1])


@pytest.mark.long
def test_gradients_reach_the_predictor_through_attention():
  """Without the ratio loss, attention alone tells the predictors what a token is worth."""
  model, params = start((32, 16), (1, 2))

  def loss(params):
    logits, _ = train(model, params, golden_vit.images())
    return jnp.sum(logits ** 2)

  grads = arrays(jax.jit(jax.grad(loss))(params)['stack'])
  for layer in (1, 2):
    for path, grad in jax.tree_util.tree_leaves_with_path(grads[f'reducer_{layer:02d}']):
      assert np.all(np.isfinite(grad)), path
      assert np.any(np.abs(grad) > 1e-12), path


@pytest.mark.long
def test_gradient_of_a_dropped_token_is_what_it_would_add():
  """The derivative at policy 0 equals the change that a small share of the token makes."""
  params = jax.tree.map(lambda leaf: leaf[1], golden_vit.params()['stack']['blocks'])
  block = Block(golden_vit.WIDTH, golden_vit.HEADS, 128)
  tokens = TokenSet.create(jax.random.normal(KEY, (1, 9, golden_vit.WIDTH)))

  def attended(policy):
    reduced = tk.reduce(tokens, tk.identity(tokens).replace(policy=policy))
    change, _ = block.apply({'params': params}, reduced, needs=frozenset(), proportional=True,
                            method='attend')
    return jnp.sum(add(reduced, change).x[0, 0])

  dropped = jnp.ones((1, 9)).at[0, 4].set(0.0)
  change = (attended(dropped.at[0, 4].set(1e-2)) - attended(dropped)) / 1e-2
  slope = jax.grad(attended)(dropped)[0, 4]
  assert abs(slope) > 1e-3
  np.testing.assert_allclose(slope, change, rtol=2e-2)


@pytest.mark.long
def test_masked_training_equals_gathered_evaluation():
  """With sure predictors both make the same hard decisions, and real tokens the same outputs."""
  model, params = start()
  # Far apart: no noise changes a decision. Zero-sum: some tokens fall on either side.
  params = jax.tree.map(lambda leaf: leaf, params)
  out = params['stack']['reducer_01']['predictor']['out']
  out['kernel'] = 1e9 * (out['kernel'] - np.mean(out['kernel'], axis=1, keepdims=True))
  image = np.asarray(golden_vit.images())[:1]
  logits, out = arrays(train(model, params, image))
  kept = np.flatnonzero(out['cuts'][1].size[0])
  assert 10 < kept.size < 60
  exact = tiny(int(kept.size) - 1)
  expected, gathered = arrays(evaluate(exact, params, image))
  order = np.argsort(gathered['cuts'][1].pos[0])
  np.testing.assert_array_equal(gathered['cuts'][1].pos[0][order] + 1, kept)
  for layer in range(1, golden_vit.DEPTH):
    np.testing.assert_allclose(out['hidden'][layer][0, kept], gathered['hidden'][layer][0, order],
                               atol=1e-5)
  np.testing.assert_allclose(logits, expected, atol=1e-5)


@pytest.mark.parametrize('keep', [12, 48])
def test_the_kept_share_follows_the_target(keep):
  """Gradient descent on the ratio loss alone, from a predictor that keeps half."""
  tokens = TokenSet.create(jax.random.normal(KEY, (8, 64, 16)), protected=0)
  module = DynamicViT()
  params = INIT(jax.random.key(0), tokens)

  @jax.jit
  def step(params, key):
    def loss(params):
      answer, sown = module.apply(params, tokens, Signals(), num_slots=keep, rngs={'dropout': key},
                                  mutable=['losses'])
      return jnp.mean(sown['losses']['ratio'][0]), jnp.mean(answer.policy)
    grads, share = jax.grad(loss, has_aux=True)(params)
    return jax.tree.map(lambda p, g: p - 3.0 * g, params, grads), share

  shares = []
  for i in range(40):
    params, share = step(params, jax.random.key(i))
    shares.append(float(share))
  assert abs(shares[0] - 0.5) < 0.1
  assert abs(np.mean(shares[-5:]) - keep / 64) < 0.03


def test_ratio_loss_counts_free_tokens_only():
  """One special token, four free and two of padding; keep 3 is a target of 2 in 4."""
  x = np.zeros((1, 7, 8), np.float32)
  kind = np.array([[tk.SPECIAL] + [tk.VISUAL] * 6], np.int8)
  valid = np.array([[True] * 5 + [False] * 2])
  size = np.array([[1.0, 1.0, 0.0, 0.0, 1.0, 1.0, 1.0]], np.float32)
  tokens = TokenSet.create(x, kind=kind, valid=valid, size=size, protected=1)
  module = DynamicViT(ratio_weight=3.0)
  params = INIT(KEY, tokens)
  params['params']['predictor']['out']['bias'] = np.array([1e4, -1e4], np.float32)

  @jax.jit
  def run(tokens):
    answer, sown = module.apply(params, tokens, Signals(), num_slots=3, rngs={'dropout': KEY},
                                mutable=['losses'])
    return tk.reduce(tokens, answer).size, sown['losses']['ratio'][0]

  reduced, loss = run(tokens)
  # Everything is wanted, but two of the four were dropped before: a share of 1/2, on target.
  np.testing.assert_array_equal(reduced, np.where(valid, size, 0.0))
  np.testing.assert_array_equal(loss, [0.0])
  _, loss = run(tokens.replace(size=np.ones((1, 7), np.float32)))
  np.testing.assert_allclose(loss, [3 * 0.5 ** 2])


@pytest.mark.long
def test_losses_have_one_number_a_row_and_the_name_of_their_layer():
  model, params = start((32, 16), (1, 2))
  _, out = train(model, params, golden_vit.images())
  assert set(out['losses']) == {'ratio_01', 'ratio_02'}
  for layer, keep in ((1, 32), (2, 16)):
    share = np.mean(np.asarray(out['cuts'][layer].size)[:, 1:], axis=1)
    np.testing.assert_allclose(out['losses'][f'ratio_{layer:02d}'], 2 * (share - keep / 64) ** 2,
                               rtol=1e-5)


def test_missing_parameters_are_an_error():
  with pytest.raises(ValueError, match='reducer_01'):
    jax.eval_shape(tiny(32).apply, {'params': golden_vit.params()}, golden_vit.images())


# Distillation.


@functools.cache
def pair():
  model, params = start((32, 16), (1, 2))
  logits, out = train(model, params, golden_vit.images())
  teacher_logits, teacher = evaluate(golden_vit.model(), golden_vit.params(),
                                     golden_vit.images())
  return arrays((logits, out['tokens'], teacher_logits, teacher['tokens']))


def test_token_loss_is_the_error_of_the_kept():
  _, tokens, _, teacher = pair()
  expected = []
  for row in range(2):
    kept = [i for i in range(1, 65) if tokens.size[row, i] > 0]
    expected.append(np.mean((tokens.x[row, kept] - teacher.x[row, kept]) ** 2))
  np.testing.assert_allclose(TOKEN_LOSS(tokens, teacher), expected, rtol=1e-5)


def test_token_loss_follows_a_gather():
  """Evaluation moves the tokens; each is still compared with its own teacher token."""
  model, params = start((32, 16), (1, 2))
  _, out = arrays(evaluate(model, params, golden_vit.images()))
  _, _, _, teacher = pair()
  tokens = out['tokens']
  found = np.take_along_axis(teacher.x, tokens.pos[..., None] + 1, axis=1)
  error = (tokens.x - found)[:, 1:] ** 2
  np.testing.assert_allclose(TOKEN_LOSS(tokens, teacher), error.mean(axis=(1, 2)), rtol=1e-5)


def test_token_loss_of_a_row_that_kept_nothing_is_zero():
  _, tokens, _, teacher = pair()
  none = tokens.replace(size=np.zeros_like(tokens.size))
  np.testing.assert_array_equal(TOKEN_LOSS(none, teacher), [0.0, 0.0])


def test_logit_loss_is_the_divergence_from_the_teacher():
  ours, theirs = np.array([[[0.0, 1.0, 2.0]], [[1.0, 1.0, -1.0]]], np.float32)
  p, q = np.exp(theirs[0]) / np.exp(theirs[0]).sum(), np.exp(ours[0]) / np.exp(ours[0]).sum()
  np.testing.assert_allclose(LOGIT_LOSS(ours, theirs), [np.sum(p * np.log(p / q))], rtol=1e-5)
  np.testing.assert_allclose(LOGIT_LOSS(theirs, theirs), [0.0], atol=1e-7)


def test_distill_weighs_both_and_leaves_the_teacher_alone():
  logits, tokens, teacher_logits, teacher = pair()
  losses = jax.jit(functools.partial(distill, logit_weight=2.0, token_weight=3.0))(
      logits, tokens, teacher_logits, teacher)
  plain = np.asarray(LOGIT_LOSS(logits, teacher_logits)), np.asarray(TOKEN_LOSS(tokens, teacher))
  np.testing.assert_allclose(losses['distill_logits'], 2 * plain[0])
  np.testing.assert_allclose(losses['distill_tokens'], 3 * plain[1])

  def total(ours, theirs, x):
    found = distill(ours, tokens.replace(x=x), theirs, teacher.replace(x=x + 1.0))
    return jnp.sum(found['distill_logits'] + found['distill_tokens'])

  to_ours, to_theirs = jax.jit(jax.grad(total, argnums=(0, 1)))(logits, teacher_logits, tokens.x)
  assert np.any(np.abs(to_ours) > 1e-6)
  np.testing.assert_array_equal(to_theirs, 0.0)
