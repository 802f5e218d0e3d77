"""Language models: decoding equals the whole forward pass, positions, causality, memory, errors."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import mostly_long
from helpers.tiny_lm import (
  PROMPT,
  ROOM,
  TINY,
  VALID,
  VISUALS,
  ids,
  image_and_text,
  planned,
  prefill,
  unstacked,
  variables,
  with_cache,
)

from models.backbones.lm import LM
from models.checkpoints.lm_config import from_config, make_lm
from models.plan import make_cache_plan, make_plan
from ops import attention
from ops.assignments import Gather
from ops.kv_cache import KVGather
from ops.primitives.select import keep_top
from ops.reducers.base import Reducer
from ops.rope import Rope
from ops.signals import Signals
from ops.tokens import SPECIAL, TEXT, VISUAL, TokenSet


def step(lm):
  """One decode step; plans are not its business, so models that differ in them share it."""
  return stepper(lm.clone(plan=None, cache_plan=None))


@functools.cache
def stepper(lm):
  return jax.jit(functools.partial(lm.apply, method='decode'))


def answer(lm, tokens, following, valid=None, weights=None):
  """Logits [B, 1 + R, V] after the prompt and after each of the tokens that follow."""
  weights = weights or unstacked(lm.depth)
  logits, cache = prefill(lm, tokens, valid, room=following.shape[1], weights=weights)
  found = [logits]
  for column in following.T:
    logits, cache = step(lm)(weights, column, cache)
    found.append(logits)
  return np.stack(found, axis=1)


# -- decoding ------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize('settings', [
    {'window': 5, 'qkv_bias': True, 'qk_norm': True}, {'tied': True, 'kv_heads': 4}])
def test_decoding_equals_the_whole_forward_pass(settings):
  lm = TINY.clone(depth=2, **settings)
  weights = jax.jit(lm.init)(jax.random.key(3), ids())
  wanted, _ = jax.jit(lm.apply)(weights, ids())
  found = answer(lm, ids()[:, :PROMPT], ids()[:, PROMPT:], weights=weights)
  np.testing.assert_allclose(found, wanted[:, PROMPT - 1:], atol=1e-5)


@pytest.mark.long
def test_padding_on_either_side_changes_nothing_and_rows_are_rows_alone():
  following = ids()[:, PROMPT:]
  found = answer(TINY, ids()[:, :PROMPT], following, jnp.asarray(VALID))
  np.testing.assert_allclose(found[:1], answer(TINY, ids()[:1, :PROMPT], following[:1]), atol=1e-5)
  for row in (1, 2):  # The same tokens, padded on the other side.
    turned = jnp.roll(ids()[row:row + 1, :PROMPT], 8 if row == 1 else 5, axis=1)
    valid = np.roll(VALID[row:row + 1], 8 if row == 1 else 5, axis=1)
    alone = answer(TINY, turned, following[row:row + 1], jnp.asarray(valid))
    np.testing.assert_allclose(found[row], alone[0], atol=1e-5)
  other = jnp.where(VALID, ids()[:, :PROMPT], 7)
  np.testing.assert_array_equal(found, answer(TINY, other, following, jnp.asarray(VALID)))


@pytest.mark.long
@pytest.mark.parametrize(('method', 'site', 'positions'), [
    ('random', 'before', 'keep'), ('random', 'after', 'compact'), ('random', 'inside', 'keep'),
    ('tome', 'between', 'keep')])
def test_decoding_after_a_cut_equals_one_longer_prompt(method, site, positions):
  # Text protects itself, so a prompt that has the answer already is cut in the same places.
  tokens = image_and_text()
  lm = planned(site=site, positions=positions, method=method)
  found = answer(lm, tokens, ids()[:, PROMPT:])
  embedded = unstacked()['params']['table'][ids()[:, PROMPT:]]
  whole = TokenSet.create(
      jnp.concatenate([tokens.x, embedded], axis=1),
      kind=jnp.pad(tokens.kind, ((0, 0), (0, ROOM)), constant_values=TEXT))
  longer = planned(slots=PROMPT + ROOM, site=site, positions=positions, method=method)
  logits, out = jax.jit(longer.apply)(variables(), whole)
  np.testing.assert_allclose(found, logits[:, -ROOM - 1:], atol=1e-5)
  pos = np.asarray(out['tokens'].pos)
  assert (np.diff(pos) > 0).all()
  assert pos[0, -1] == {'keep': PROMPT + ROOM - 1, 'compact': PROMPT + ROOM - 5}[positions]


@pytest.mark.long
def test_picking_inside_attention_equals_picking_behind_it():
  """The rows that stay have read the same keys; a cache holds what attention saw in both."""
  tokens = image_and_text(jnp.asarray(VALID))
  inside, between = (planned(site=site, method='topk', args={'by': 'received_attention'})
                     for site in ('inside', 'between'))
  for found, wanted in zip(prefill(inside, tokens), prefill(between, tokens), strict=True):
    chex.assert_trees_all_close(found, wanted, atol=1e-5)
  with pytest.raises(ValueError, match='tome joins tokens inside attention, where causal rows'):
    prefill(planned(site='inside', method='tome'), tokens)


@pytest.mark.long
def test_restarting_equals_a_prompt_of_what_is_left():
  lm = planned(visual=0, token_kinds='text', positions='restart', keep=7, layers=2, site='before')
  kept = jax.jit(lm.apply)(variables(), ids()[:, :PROMPT])[1]['cuts'][2]
  left = np.asarray(kept.owner) >= 0
  shorter = jnp.asarray(np.asarray(ids()[:, :PROMPT])[left].reshape(3, 7))
  np.testing.assert_allclose(answer(lm, ids()[:, :PROMPT], ids()[:, PROMPT:]),
                             answer(TINY, shorter, ids()[:, PROMPT:]), atol=1e-6)


@pytest.mark.long
@pytest.mark.parametrize('site', ['before', 'between'])
def test_pruned_caches_answer_as_masked_ones(site):
  tokens = image_and_text(jnp.asarray(VALID))
  pruned, masked = (planned(site=site, mode=mode) for mode in ('gather', 'mask'))
  np.testing.assert_allclose(answer(pruned, tokens, ids()[:, PROMPT:]),
                             answer(masked, tokens, ids()[:, PROMPT:]), atol=1e-5)
  sizes = [[kv.filled for kv in prefill(lm, tokens)[1].layers] for lm in (pruned, masked)]
  assert sizes == [[12, 10, 8] if site == 'before' else [12, 12, 10], [12] * 3]


@pytest.mark.long
def test_cut_rows_are_rows_alone_whatever_text_they_have():
  tokens = image_and_text(jnp.asarray(VALID).at[1].set(True).at[1, 10:].set(False))
  lm = planned(method='topk', args={'by': 'received_attention'})
  found = answer(lm, tokens, ids()[:, PROMPT:])
  short = image_and_text()
  short = jax.tree.map(lambda x: x[1:2], short)
  short = short.replace(x=tokens.x[1:2, :10], pos=tokens.pos[1:2, :10], kind=tokens.kind[1:2, :10],
                        owner=jnp.arange(10)[None])
  alone = planned(slots=10, method='topk', args={'by': 'received_attention'})
  np.testing.assert_allclose(found[1:2], answer(alone, short, ids()[1:2, PROMPT:]), atol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize('storage', ['stacked', 'unstacked'])
def test_runs_of_layers_and_layers_alone_store_the_same(storage):
  weights = variables() if storage == 'stacked' else unstacked()
  logits, cache = prefill(TINY, ids()[:, :PROMPT], weights=weights)
  wanted, stored = prefill(TINY, ids()[:, :PROMPT])
  np.testing.assert_allclose(logits, wanted, atol=1e-5)
  chex.assert_trees_all_close(cache, stored, rtol=1e-7, atol=1e-5)
  kv = cache.layers[2]
  assert (kv.k.shape, kv.filled, cache.room) == ((3, 2, PROMPT + ROOM, 8), PROMPT, ROOM)
  np.testing.assert_array_equal(kv.valid, np.arange(PROMPT + ROOM)[None].repeat(3, 0) < PROMPT)


# -- the cache -----------------------------------------------------------------------------------


@pytest.mark.long
def test_sinks_and_the_latest_stay_and_padding_goes():
  lm = with_cache(keep=5, args={'sinks': 2}, layers=(0, 2))
  _, cache = prefill(lm, ids()[:, :PROMPT], jnp.asarray(VALID))
  assert [kv.filled for kv in cache.layers] == [5, 12, 5]
  assert [kv.k.shape[2] for kv in cache.layers] == [9, 16, 9]
  kv = cache.layers[2]
  for row, length in enumerate(VALID.sum(axis=1)):
    wanted = [0, 1, length - 3, length - 2, length - 1]
    np.testing.assert_array_equal(np.sort(kv.pos[row, :, :5]), [wanted, wanted])
  assert np.asarray(kv.valid)[..., :5].all()
  assert not np.asarray(kv.valid)[..., 5:].any()


@pytest.mark.long
def test_a_small_cache_answers_as_a_full_one_that_hides_the_rest():
  lm = with_cache(keep=5, args={'sinks': 2})
  following = ids()[:, PROMPT:]
  found = answer(lm, ids()[:, :PROMPT], following)
  logits, cache = prefill(TINY, ids()[:, :PROMPT])
  np.testing.assert_allclose(found[:, 0], logits, atol=1e-6)
  seen = np.isin(np.arange(PROMPT + ROOM), [0, 1, 9, 10, 11])
  layers = tuple(kv.replace(valid=kv.valid & seen[None]) for kv in cache.layers)
  logits, _ = step(TINY)(unstacked(), following[:, 0], cache.replace(layers=layers))
  np.testing.assert_allclose(found[:, 1], logits, atol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize('rope', [Rope(8), Rope(8, scaling='yarn', factor=4.0, original=8)])
def test_compacted_keys_are_those_of_a_prompt_without_gaps(rope):
  lm = with_cache(TINY.clone(depth=1, rope=rope), keep=6, args={'sinks': 2}, positions='compact')
  weights = unstacked(1)
  _, cache = prefill(lm, ids()[:, :PROMPT], weights=weights)
  kept = jnp.concatenate([ids()[:, :2], ids()[:, 8:PROMPT]], axis=1)
  # One layer: a key knows nothing but its own token and its position.
  _, wanted = prefill(lm.clone(cache_plan=None), kept, weights=weights)
  np.testing.assert_allclose(cache.layers[0].k, wanted.layers[0].k, atol=1e-5)
  np.testing.assert_array_equal(cache.layers[0].start, wanted.layers[0].start)
  np.testing.assert_array_equal(cache.layers[0].pos[:, 0], wanted.layers[0].pos)


def test_caches_of_restarted_prompts_shrink_too():
  lm = planned(visual=0, token_kinds='text', positions='restart', keep=7, layers=2, site='before')
  lm = with_cache(lm, keep=3)
  assert [(cut.slots_in, cut.slots_out) for cut in lm.cache_plan.events] == [(7, 3)] * 3
  _, cache = prefill(lm, ids()[:, :PROMPT])
  assert [kv.filled for kv in cache.layers] == [3] * 3


def test_caches_shrink_after_tokens_did():
  lm = with_cache(planned(), visual=VISUALS, keep_ratio=0.5, args={'sinks': 1})
  assert [(cut.slots_in, cut.slots_out) for cut in lm.cache_plan.events] == [
      (12, 6), (12, 6), (10, 5)]
  _, cache = prefill(lm, image_and_text())
  assert [kv.filled for kv in cache.layers] == [6, 6, 5]


class Heads(Reducer):
  """Keeps other tokens in each head, and fewer in the second: what adaptive methods answer."""

  needs = frozenset({'keys', 'window_attention', 'layer'})
  site = 'cache'
  span = 3

  def __call__(self, tokens, signals, *, num_slots):
    assert signals.window_attention.shape[1:3] == (4, 3)
    src = jnp.stack([jnp.arange(num_slots), tokens.slots - 1 - jnp.arange(num_slots)])
    valid = jnp.stack([jnp.ones(num_slots, bool), jnp.arange(num_slots) < 2])
    shape = (tokens.x.shape[0], *src.shape)
    return KVGather(jnp.broadcast_to(src, shape), jnp.broadcast_to(valid, shape))


@pytest.mark.long
def test_each_head_keeps_its_own_tokens():
  lm = with_cache(keep=4)
  lm = lm.clone(cache_plan=lm.cache_plan.with_method(Heads()))
  _, cache = prefill(lm, ids()[:, :PROMPT])
  _, full = prefill(TINY, ids()[:, :PROMPT])
  kv, whole = cache.layers[2], full.layers[2]
  np.testing.assert_allclose(kv.k[:, 0, :4], whole.k[:, 0, :4], atol=1e-6)
  np.testing.assert_allclose(kv.v[:, 1, :2], whole.v[:, 1, [11, 10]], atol=1e-6)
  np.testing.assert_array_equal(kv.valid[0, :, :4], [[1, 1, 1, 1], [1, 1, 0, 0]])
  logits, after = step(lm)(unstacked(), ids()[:, PROMPT], cache)
  assert np.isfinite(logits).all()
  np.testing.assert_array_equal(after.layers[2].pos[:, :, 4], PROMPT)


@functools.cache
def merged_among(slots):
  """Owners and logits of a prompt with padding behind it that repeats what is there."""
  lm, place = planned(slots=slots, method='tome', layers=1, keep=4), np.arange(slots) % PROMPT

  @jax.jit
  def run(variables, tokens):
    valid = jnp.broadcast_to(jnp.arange(slots) < PROMPT, (3, slots))
    tokens = TokenSet.create(tokens.x[:, place], pos=tokens.pos[:, place], valid=valid,
                             kind=jnp.where(valid, tokens.kind[:, place], TEXT))
    logits, out = lm.apply(variables, tokens)
    return out['tokens'].owner[:, :PROMPT], logits[:, :PROMPT - 2]

  return run(variables(), image_and_text())


@pytest.mark.long
@pytest.mark.parametrize('padding', [1, 2, 3])
def test_padding_of_no_length_changes_which_pairs_merge(padding):
  owner, logits = merged_among(PROMPT)
  found, values = merged_among(PROMPT + padding)
  np.testing.assert_array_equal(found, owner)
  np.testing.assert_allclose(values, logits, atol=1e-5)


# -- causality -----------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize('method', ['tome', 'pitome', 'dpcknn'])
def test_nothing_later_is_seen_even_through_merging(method):
  lm = planned(method=method, token_kinds=('visual', 'text'), keep=(9, 7), site='between')
  x = image_and_text().x[:1]

  @jax.jit
  def seen(x):
    def numbers(x):
      tokens = image_and_text()
      tokens = jax.tree.map(lambda leaf: leaf[:1], tokens).replace(x=x)
      logits, out = lm.apply(variables(), tokens)
      return logits[0] @ jax.random.normal(jax.random.key(4), (29,)), out['tokens']

    return jax.jacrev(numbers, has_aux=True)(x)

  jacobian, tokens = seen(x)
  reach = np.abs(np.asarray(jacobian)[:, 0]).max(-1) > 1e-7
  assert tokens.slots == 7
  later = np.arange(PROMPT)[None] > np.asarray(tokens.pos[0])[:, None]
  assert not (reach & later).any()
  assert reach[np.arange(7), np.asarray(tokens.pos[0])].all()


def test_attention_goes_by_positions_and_windows_by_positions():
  q, k, v = np.random.default_rng(5).normal(size=(3, 1, 6, 2, 4)).astype(np.float32)
  pos = np.array([[0, 2, 3, 7, 8, 9]], np.int32)

  @jax.jit
  def run(q, k, v, pos):
    found = attention.attend(q, k, v, positions=pos, window=3)
    return found, attention.rows(q, k, found.lse, last=pos, positions=pos, window=3)

  found, rows = run(q, k, v, pos)
  logits = np.einsum('bnhd,bmhd->bhnm', q, k) / 2
  gap = pos[0][:, None] - pos[0][None]
  logits = np.where((gap >= 0) & (gap < 3), logits, -np.inf)
  wanted = np.einsum('bhnm,bmhd->bnhd', jax.nn.softmax(logits, axis=-1), v)
  np.testing.assert_allclose(found.out, wanted, atol=1e-5)
  np.testing.assert_allclose(rows, jax.nn.softmax(logits, axis=-1), atol=1e-5)
  with pytest.raises(ValueError, match="'cudnn' has no window of 3 positions"):
    attention.attend(q, k, v, positions=pos, window=3, implementation='cudnn')


def test_sections_turn_by_their_own_numbers():
  rope = Rope(8, sections=(2, 1, 1))
  x = jax.random.normal(jax.random.key(6), (2, 5, 3, 8))
  pos = jnp.asarray(np.random.default_rng(0).integers(0, 9, (2, 5, 4)), jnp.int32)
  found = np.asarray(rope.rotate(x, pos))
  for pair, axis in enumerate((1, 1, 2, 3)):
    alone = np.asarray(Rope(8).rotate(x, pos[..., axis]))
    np.testing.assert_allclose(found[..., [pair, pair + 4]], alone[..., [pair, pair + 4]],
                               atol=1e-5)
  assert Rope(16, sections=(3, 3, 2), spread='interleaved').axes().tolist() == [
      0, 1, 2, 0, 1, 2, 0, 1]
  with pytest.raises(ValueError, match='takes 4 numbers a token'):
    rope.rotate(x, pos[..., 0])


@pytest.mark.long
def test_decoding_with_sections_goes_on_after_the_largest_number():
  lm = TINY.clone(rope=Rope(8, sections=(2, 1, 1)))
  tokens = image_and_text()
  # Two of text, 2 x 3 patches at one time, then text after the widest of them.
  rotary = np.array([[0] * 3, [1] * 3, *[[2, 2 + i // 3, 2 + i % 3] for i in range(6)],
                     *[[5 + i] * 3 for i in range(4 + ROOM)]])
  pos = np.concatenate([np.arange(PROMPT + ROOM)[:, None], rotary], axis=1).astype(np.int32)
  pos = jnp.broadcast_to(pos, (3, *pos.shape))
  found = answer(lm, tokens.replace(pos=pos[:, :PROMPT]), ids()[:, PROMPT:])
  embedded = unstacked()['params']['table'][ids()[:, PROMPT:]]
  whole = TokenSet.create(jnp.concatenate([tokens.x, embedded], axis=1), pos=pos)
  logits, _ = jax.jit(lm.apply)(variables(), whole)
  np.testing.assert_allclose(found, logits[:, -ROOM - 1:], atol=1e-5)
  # Merged slots take the whole position of their latest.
  cut = planned(lm, method='tome', keep=(4, 3))
  _, out = jax.jit(cut.apply)(variables(), tokens.replace(pos=pos[:, :PROMPT]))
  left = np.asarray(out['tokens'].pos)
  np.testing.assert_array_equal(left, np.asarray(pos)[0][left[..., 0]])


# -- signals -------------------------------------------------------------------------------------


class Look(Reducer):
  """Asks for everything, and keeps what it is told among the stats."""

  needs = frozenset({
      'keys', 'queries', 'values', 'plain_queries', 'last_attention', 'window_attention',
      'row_attention', 'received_attention', 'hidden', 'hidden_in', 'attention_out', 'mlp_in',
      'mlp_out', 'mlp_hidden', 'next_last_attention', 'next_row_attention',
      'next_received_attention', 'next_keys', 'next_queries', 'rope'})
  site = 'after'
  span = 2

  def __init__(self):
    self.told = {}

  def rows(self, tokens):
    return (tokens.kind == TEXT) & (tokens.pos >= 8)

  def max_rows(self, tokens):
    return 4

  def __call__(self, tokens, signals: Signals, *, num_slots):
    self.told = {name: getattr(signals, name) for name in self.needs}
    src = jnp.broadcast_to(jnp.arange(tokens.slots)[-num_slots:], (tokens.x.shape[0], num_slots))
    return Gather(src, tokens.slots)


@pytest.mark.parametrize('implementation', [
    pytest.param('xla', marks=pytest.mark.long), 'lse'])
def test_signals_are_what_they_say(implementation, monkeypatch):
  if implementation == 'lse':  # As beside a fused kernel: rows from the log-sum-exp.
    fused = attention.attend
    monkeypatch.setattr(attention, 'attend', lambda *args, **more: fused(
        *args, **{**more, 'implementation': 'xla'}))
  method = Look()
  lm = planned(layers=(1,), keep=2)
  plan = lm.plan.with_method(method, site='after')
  lm = lm.clone(plan=plan, capture=True,
                implementation='xla' if implementation == 'xla' else 'splash')
  valid, tokens = VALID, image_and_text(jnp.asarray(VALID))
  bound = lm.bind(variables()).stack.block

  @jax.jit
  def run(variables, tokens):
    """Returns what the model tells, and what its second layer would read."""
    _, out = lm.apply(variables, tokens)
    told = {name: value for name, value in method.told.items() if name != 'rope'}
    block, hidden = of_layer(variables, 2), out['before'][1].x
    normed = bound.apply(block, hidden, method=lambda m, x: m.norm1(x))
    following = bound.apply(block, normed, tokens.pos,
                            method=lambda m, x, p: m._queries_and_keys(x, p))[:2]
    rotated = lm.rope.rotate(told['plain_queries'], tokens.pos)
    return (out['hidden'][0], hidden, told, following, rotated, method.rows(tokens) & tokens.valid,
            of_layer(variables, 1)['params'])

  def of_layer(variables, layer):
    return {'params': jax.tree.map(lambda x: x[layer], variables['params']['stack']['blocks'])}

  hidden_in, hidden, told, (q, k), rotated, rows, block = jax.tree.map(
      np.asarray, run(variables(), tokens))

  def maps(q, k, pos):
    logits = np.einsum('bnkgd,bmkd->bkgnm', np.reshape(q, (3, PROMPT, 2, 2, 8)), k) / np.sqrt(8)
    seen = (pos[:, None] <= pos[:, :, None]) & valid[:, None]
    logits = np.where(seen[:, None], logits.reshape(3, 4, PROMPT, PROMPT), -1e9)
    return np.asarray(jax.nn.softmax(logits, axis=-1))

  pos, ends = np.asarray(tokens.pos), [11, 11, 6]
  np.testing.assert_allclose(told['next_keys'], k, atol=1e-5)
  np.testing.assert_allclose(told['next_queries'], q, atol=1e-5)
  for start, found in (('', maps(told['queries'], told['keys'], pos)), ('next_', maps(q, k, pos))):
    last = found[np.arange(3), :, ends]
    np.testing.assert_allclose(told[start + 'last_attention'], last, atol=1e-5)
    for row in range(3):
      for name, mask in (('row_attention', rows), ('received_attention', valid)):
        mean = found[row][:, mask[row]].mean(axis=1) if mask[row].any() else np.zeros((4, PROMPT))
        np.testing.assert_allclose(told[start + name][row], mean, atol=1e-5)
  found = maps(told['queries'], told['keys'], pos)
  np.testing.assert_allclose(told['window_attention'][2], found[2][:, [5, 6]], atol=1e-5)
  np.testing.assert_allclose(rotated, told['queries'], atol=1e-5)
  np.testing.assert_allclose(told['hidden_in'], hidden_in, atol=1e-6)
  np.testing.assert_allclose(told['hidden_in'] + told['attention_out'] + told['mlp_out'], hidden,
                             atol=1e-5)
  np.testing.assert_allclose(told['mlp_hidden'] @ block['down']['kernel'], told['mlp_out'],
                             atol=1e-4)
  squares = (told['mlp_in'] / block['norm2']['scale']) ** 2
  np.testing.assert_allclose(squares.mean(axis=-1), 1.0, rtol=1e-2)


def test_padding_of_other_kinds_keeps_its_place_and_is_no_text():
  seen = {}

  class Count(Reducer):
    def __call__(self, tokens, signals, *, num_slots):
      seen['text'] = (tokens.kind == TEXT) & tokens.real
      seen['kept'] = tokens.fixed
      seen['protected'] = tokens.protected
      seen['budget'] = tokens.budget
      return keep_top(tokens, jnp.zeros(tokens.kind.shape), num_slots=num_slots)

  lm = planned(layers=(1,), keep=2)
  lm = lm.clone(plan=lm.plan.with_method(Count()))
  valid = jnp.asarray(np.arange(PROMPT) < np.array([[12], [9], [10]]))

  @jax.jit
  def run(variables, tokens):
    _, out = lm.apply(variables, tokens)
    return out, dict(seen)

  out, seen = run(variables(), image_and_text(valid))
  np.testing.assert_array_equal(seen['text'].sum(axis=1), [6, 3, 4])
  np.testing.assert_array_equal(seen['kept'].sum(axis=1), [6, 3, 4])
  np.testing.assert_array_equal(seen['budget'], 2)
  assert seen['protected'] == 6
  visual = np.asarray(out['tokens'].real & (out['tokens'].kind == VISUAL)).sum(axis=1)
  np.testing.assert_array_equal(visual, 2)


@pytest.mark.long
@pytest.mark.parametrize('padding', ['anywhere', 'last'])
def test_padding_at_the_end_needs_no_mask_in_a_kernel(padding, monkeypatch):
  valid = jnp.asarray(np.arange(PROMPT) < np.array([[12], [9], [7]]))
  tokens, lm = image_and_text(valid), planned(layers=(1,), keep=2)
  expected, _ = jax.jit(lm.apply)(variables(), tokens)
  expected = np.asarray(expected)
  plain, masked = attention.attend, []

  def kernel(*args, bias, **more):
    masked.append(bias is not None)
    return plain(*args, bias=bias, **{**more, 'implementation': 'xla'})

  monkeypatch.setattr(attention, 'attend', kernel)
  fused = lm.clone(implementation='splash')
  logits, out = jax.jit(fused.apply)(variables(), tokens.replace(padding=padding))
  real = np.asarray(out['tokens'].real)
  np.testing.assert_allclose(np.asarray(logits)[real], expected[real], atol=1e-5)
  # The cut, in layer 1 after its attention, leaves padding at the end anyway.
  assert masked == [padding == 'anywhere'] * 2 + [False]


# -- memory --------------------------------------------------------------------------------------


# One row, and one head of keys, are what XLA strips in front of a product.
@pytest.mark.parametrize(('reduced', 'rows', 'kv_heads'), mostly_long([
    ('none', 2, 2), ('tokens', 2, 2), ('heads', 2, 2), ('none', 1, 2), ('none', 3, 1),
    ('heads', 1, 1)], short=2))
def test_a_decode_step_copies_neither_cache_nor_weights(reduced, rows, kv_heads):
  lm = LM(vocabulary=64, width=32, depth=4, mlp=64, heads=4, kv_heads=kv_heads, head_width=16,
          context=4096, rope=Rope(16))
  if reduced == 'tokens':
    host = lm.host(512, visual=500)
    lm = lm.clone(plan=make_plan(
        {'method': 'random', 'token_kinds': 'visual', 'layers': 2, 'keep_ratio': 0.5}, host))
  elif reduced == 'heads':
    lm = lm.clone(cache_plan=make_cache_plan(
        {'method': 'streaming_llm', 'keep_ratio': 0.5}, lm.host(512)))
  bare = lm.clone(plan=None, cache_plan=None)
  shapes = jax.eval_shape(bare.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))['params']
  blocks = shapes['stack']['blocks']
  blocks = tuple(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), blocks)
                 for _ in range(4))
  weights = {'params': {**shapes, 'stack': {'blocks': blocks}}}
  tokens = jax.eval_shape(lambda: image_of(rows, 512, 500))
  _, cache = jax.eval_shape(functools.partial(lm.apply, room=64, method='prefill'), weights, tokens)
  compiled = jax.jit(functools.partial(lm.apply, method='decode'), donate_argnums=2).lower(
      weights, jax.ShapeDtypeStruct((rows,), jnp.int32), cache).compile()
  found = compiled.memory_analysis()
  held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
  full = 4 * 2 * rows * kv_heads * (512 + 64) * 16 * 4
  assert (held > full) == (reduced == 'none')
  assert found.alias_size_in_bytes >= held
  assert found.temp_size_in_bytes < 0.1 * held


@pytest.mark.long
@pytest.mark.parametrize('remat', ['none', 'full'])
def test_training_reads_the_stack_and_its_gradient_is_whole(remat):
  lm = planned(TINY.clone(depth=4, remat=remat), layers=(1,), keep=3)

  def loss(variables, **training):
    return jnp.mean(lm.apply(variables, image_and_text(), **training)[0] ** 2)

  expected = jax.jit(jax.grad(loss))(variables(4))
  train = jax.grad(functools.partial(loss, rngs={'dropout': jax.random.key(0)}))
  found = jax.jit(train)(variables(4))
  chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)
  assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(found['params']['stack']))


def image_of(rows, slots, visual):
  kind = jnp.broadcast_to(jnp.where(jnp.arange(slots) < visual, VISUAL, TEXT).astype(jnp.int8),
                          (rows, slots))
  return TokenSet.create(jnp.zeros((rows, slots, 32)), kind=kind)


# -- configs and errors --------------------------------------------------------------------------


LLAMA = {'model_type': 'llama', 'hidden_size': 16, 'num_hidden_layers': 2, 'intermediate_size': 24,
         'num_attention_heads': 4, 'vocab_size': 29}


@pytest.mark.long
def test_named_models_have_their_published_sizes():
  sizes = {'llama2_7b': 6738415616, 'llama3.1_8b': 8030261248, 'mistral_7b': 7241732096,
           'qwen2.5_7b': 7615616512, 'qwen3_8b': 8190735360, 'llama3.2_1b': 1235814400,
           'llama2_13b': 13015864320, 'qwen2_0.5b': 494032768, 'qwen3_0.6b': 596049920}
  for name, count in sizes.items():
    shapes = jax.eval_shape(make_lm(name).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count, name
  assert make_lm('mistral_7b').window == 4096
  assert make_lm('mistral_7b_v0.3').window == make_lm('qwen2_7b').window == 0
  assert make_lm('vicuna_7b_16k').rope == Rope(128, scaling='linear', factor=4.0)


def test_both_forms_of_config_mean_the_same():
  scaling = {'factor': 8.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0,
             'original_max_position_embeddings': 64}
  old = from_config(LLAMA | {'rope_theta': 5e5, 'rope_scaling': {'rope_type': 'llama3', **scaling}})
  new = from_config(LLAMA | {
      'rope_parameters': {'rope_type': 'llama3', 'rope_theta': 5e5, **scaling}})
  assert old == new
  assert from_config({'vision_config': {}, 'text_config': LLAMA}) == from_config(LLAMA)
  sections = from_config(LLAMA | {'rope_scaling': {'type': 'mrope', 'mrope_section': [1, 1, 0]}})
  assert sections.rope.sections == (1, 1, 0)


@pytest.mark.parametrize(('config', 'message'), [
    ({'model_type': 'gpt2'}, "'gpt2' is unknown: known are llama, mistral, qwen2, qwen3"),
    ({'rope_scaling': {'rope_type': 'longrope'}},
     "'longrope' is unknown .*: choose one of default, lin"),
    ({'hidden_act': 'gelu'}, "hidden_act='gelu' is unknown"),
    ({'attention_bias': True}, 'attention_bias=True is unknown'),
    ({'model_type': 'qwen2', 'sliding_window': 8, 'use_sliding_window': True,
      'max_window_layers': 1, 'num_key_value_heads': 2}, 'a sliding window in some layers only'),
    ({'partial_rotary_factor': 0.5}, 'partial_rotary_factor=0.5 is unknown'),
])
def test_unknown_architectures_are_worded_errors(config, message):
  with pytest.raises(ValueError, match=message):
    from_config(LLAMA | config)


def test_settings_that_do_not_exist_are_worded_errors():
  with pytest.raises(ValueError, match=r"has no setting 'dtyp' .did you mean 'dtype'"):
    from_config(LLAMA, dtyp=jnp.bfloat16)
  with pytest.raises(ValueError, match=r"'llama2_7' is unknown .did you mean 'llama2_7b'"):
    make_lm('llama2_7')


@pytest.mark.parametrize(('tokens', 'valid', 'message'), [
    (jnp.zeros((1, 65), jnp.int32), None, 'a prompt of 65 slots and 5 .* exceed the context of 64'),
    (jnp.zeros((1, 60), jnp.int32), None, 'a prompt of 60 slots and 5 .* exceed the context of 64'),
    (jnp.zeros((1, 8)), None, 'expected integers'),
    (jnp.zeros(8, jnp.int32), None, 'expected integers'),
    (jnp.zeros((1, 8), jnp.int32), jnp.ones((1, 7), bool), 'a mask of shape'),
    (TokenSet.create(jnp.zeros((1, 8, 12))), None, 'embeddings of width 12 do not fit'),
    (TokenSet.create(jnp.zeros((1, 8, 16))), jnp.ones((1, 8), bool), 'has its own mask'),
])
def test_prompts_that_do_not_fit_are_worded_errors(tokens, valid, message):
  with pytest.raises(ValueError, match=message):
    TINY.apply(variables(), tokens, valid, room=5, method='prefill')


def test_plans_for_other_prompts_are_worded_errors():
  with pytest.raises(ValueError, match='the plan is for prompts of 12 slots, not 11'):
    planned(visual=0, token_kinds='text').apply(variables(), ids()[:, :11])
  with pytest.raises(ValueError, match='is for 12 slots in layer 0, which sees 11'):
    prefill(with_cache(keep=5), ids()[:, :11])


@pytest.mark.parametrize(('config', 'message'), [
    ({'site': 'amid'},
     "site 'amid' is unknown: choose one of before, branch, inside, between, after"),
    ({'token_kinds': 'audio'},
     "token_kinds='audio' names no tokens of this host: it has visual .6., text .6."),
    ({'token_kinds': 'special'}, "token_kinds='special' names no tokens"),
    ({'positions': 'gone'}, "positions='gone' is unknown here: choose one of keep, anchor, comp"),
    ({'method': 'evit'}, 'evit needs cls_attention, which this host does not offer'),
    ({'keep': -1}, 'keep=-1 in layer 1 is impossible: 6 tokens are there'),
])
def test_plans_that_do_not_fit_are_worded_errors(config, message):
  with pytest.raises(ValueError, match=message):
    planned(**({'layers': 1, 'keep': 2} | config))


@pytest.mark.parametrize(('config', 'message'), [
    ({'method': 'tome', 'keep': 3}, "method 'tome' is unknown: choose one of .*streaming_llm"),
    ({'keep_ratio': 0.5, 'keep': 3}, 'needs one budget, got .*choose one of keep_ratio, keep, rem'),
    ({'flops_ratio': 0.5}, "has no key 'flops_ratio'"),
    ({'keep': 3, 'site': 'after'}, "has no key 'site'"),
    ({'keep': 3, 'positions': 'restart'}, 'choose one of keep, compact'),
])
def test_cache_plans_that_do_not_fit_are_worded_errors(config, message):
  with pytest.raises(ValueError, match=message):
    with_cache(**config)


def test_hosts_count_kinds():
  host = TINY.host(12, visual=6, special=2)
  assert host.counts == (('visual', 6), ('special', 2), ('text', 4))
  plan = make_plan({'method': 'random', 'token_kinds': 'visual', 'keep': 3, 'layers': 1}, host)
  assert (plan.only.of, plan.events[0].protected) == ((VISUAL,), 6)
  assert [(cut.slots_in, cut.slots_out) for cut in plan.events] == [(12, 9)]
  plan = make_plan({'method': 'random', 'token_kinds': ('visual', 'special'), 'keep': 3,
                    'layers': 1}, host)
  assert (plan.only.of, plan.events[0].protected) == ((VISUAL, SPECIAL), 4)
  with pytest.raises(ValueError, match='a prompt of 12 slots with'):
    TINY.host(12, visual=13)
