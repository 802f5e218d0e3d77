"""Methods in a language model of which no code is known: what their papers claim, on small prompts.

Axes: B batch, N slots, D features, H heads.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import tiny_lm

from lib.cost import lm as lm_cost
from lib.report.relevance import relevance
from models.backbones.lm_block import rms_norm
from models.compressors.explained import Explained
from ops import attention
from ops import tokens as tk
from ops.primitives.queries import sample_of
from ops.reducers.branch.cmai import CMAI
from ops.reducers.branch.lemo import LeMo
from ops.reducers.cache.still import STILL
from ops.reducers.language.adatoken_3d import AdaToken3D
from ops.reducers.language.catp import CATP
from ops.reducers.language.catp_images import CATPImages
from ops.reducers.language.framefusion_prune import FrameFusionPrune
from ops.reducers.language.lvlm_csp import LVLMCSP
from ops.reducers.language.subtoken_merge import SubtokenMerge
from ops.reducers.language.todre_exit import ToDREExit
from ops.signals import Signals
from ops.tokens import TEXT, VISUAL, TokenSet


def prompt(kinds, seed=0, width=6):
  """One row of random tokens, 'v' for visual ones, 't' for text, '.' for padding."""
  kind = np.array([[VISUAL if letter == 'v' else TEXT for letter in kinds]], np.int8)
  valid = np.array([[letter != '.' for letter in kinds]])
  pos = np.maximum(np.cumsum(valid, axis=1) - 1, 0).astype(np.int32)
  x = np.random.default_rng(seed).normal(size=(1, len(kinds), width)).astype(np.float32)
  return TokenSet.create(jnp.asarray(x), pos=jnp.asarray(pos), kind=jnp.asarray(kind),
                         valid=None if valid.all() else jnp.asarray(valid),
                         protected=kinds.count('t'))


def left(method, tokens, told=None, *, keep):
  """Slots that stay, with `keep` visual tokens."""
  run = jax.jit(functools.partial(method, num_slots=keep + tokens.protected))
  reduced = tk.reduce(tokens, run(tokens, told or Signals()))
  return np.flatnonzero(reduced.owner[0] >= 0)


def unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_samples():
  tokens = prompt('t.vv.vttvvvt')
  np.testing.assert_array_equal(sample_of(tokens)[0][np.asarray(tokens.real[0])],
                                [0, 1, 1, 1, 1, 1, 2, 2, 2, 2])


def best_cover(x, text, count, weight=0.7):
  """The greedy choice that the paper writes down, one image at a time."""
  alike, near = (1 + unit(x) @ unit(x).T) / 2, (1 + unit(x) @ unit(text)) / 2
  picked = []
  for _ in range(count):
    value = {i: sum(alike[[*picked, i]].max(axis=0)) + weight * near[[*picked, i]].sum()
             for i in range(len(x)) if i not in picked}
    picked.append(max(value, key=value.get))
  return sorted(picked)


def test_catp_covers_each_image():
  tokens = prompt('tvvvvvvvvttvvvvvvt')
  x = np.asarray(tokens.x[0])
  stays = left(CATPImages(), tokens, keep=8)
  first = best_cover(x[1:9], x[9:11].mean(axis=0), 5)  # 8 * 8 // 14, and one of what is left over.
  second = best_cover(x[11:17], x[17], 3)
  visual = [slot for slot in stays if tokens.kind[0, slot] == VISUAL]
  np.testing.assert_array_equal(visual, [*np.array(first) + 1, *np.array(second) + 11])


@pytest.mark.parametrize('part', ['context', 'query'])
def test_catp_prunes_examples_then_the_query(part):
  tokens = prompt('tvvvvtvvvvtvvvvt')
  x, query = np.asarray(tokens.x[0]), np.arange(11, 15)
  context = np.array([1, 2, 3, 4, 6, 7, 8, 9])
  rng = np.random.default_rng(3)
  before, now = rng.random((2, 16)).astype(np.float32)
  told = Signals(last_attention=jnp.asarray(now)[None, None])
  stats = {'asked': jnp.asarray(before)[None]} if part == 'context' else {}
  stays = left(CATP(part=part), tokens.replace(stats=stats), told, keep=9)
  pool = query if part == 'query' else context
  spared = context if part == 'query' else query
  mean = x[1:11].mean(axis=0) if part == 'query' else x[11:].mean(axis=0)
  scores = unit(x[pool]) @ unit(mean)
  if part == 'context':
    scores = np.maximum(now - before, 0)[pool] + 0.6 * scores
  best = pool[np.argsort(-scores)[:9 - len(spared)]]
  np.testing.assert_array_equal(stays, np.sort([0, 5, 10, 15, *spared, *best]))


@pytest.mark.parametrize('seen', [False, True])
def test_todre_lets_everything_leave_that_words_do_without(seen):
  """Words look at the image, or at themselves alone; the image sees no word behind it."""
  tokens = prompt('tvvvvttt')
  keys = np.zeros((1, 8, 1, 4), np.float32)
  keys[0, 1:5, :, 0] = 1
  queries = np.zeros((1, 8, 1, 4), np.float32)
  queries[0, 5:, :, 0] = 12 if seen else -12
  told = Signals(queries=jnp.asarray(queries), keys=jnp.asarray(keys))
  stays = jax.jit(functools.partial(ToDREExit(), num_slots=4))(tokens, told).valid
  np.testing.assert_array_equal(stays[0], [True] + [seen] * 4 + [True] * 3)


def test_todre_asks_at_seven_eighths():
  assert list(ToDREExit().default_shares(32)) == [27]


def test_framefusion_prunes_by_the_attention_of_all_queries():
  """As its release has it: the mean of a map over heads and queries, the best of the image."""
  tokens = prompt('ttvvvvvvtt')
  maps = np.random.default_rng(5).random((1, 3, 10, 10)).astype(np.float32) * np.tri(10)
  maps /= maps.sum(axis=3, keepdims=True)
  scores, ratio = maps.mean(axis=(1, 2))[0, 2:8], 0.4
  best = 2 + np.argsort(-scores)[:round(6 * (1 - ratio))]
  told = Signals(received_attention=jnp.asarray(maps.mean(axis=2)))
  stays = left(FrameFusionPrune(), tokens, told, keep=4)
  np.testing.assert_array_equal(stays, np.sort([0, 1, *best, 8, 9]))


def test_lvlm_csp_keeps_one_of_each_cluster():
  tokens = prompt('tvvvvvvvvvt')
  centres = np.eye(3, 6, dtype=np.float32) * 9
  x = np.asarray(tokens.x).copy()
  x[0, 1:10] = np.repeat(centres, 3, axis=0) + 0.3 * x[0, 1:10]
  stays = left(LVLMCSP(neighbours=3), tokens.replace(x=jnp.asarray(x)), keep=3)
  np.testing.assert_array_equal((stays[1:4] - 1) // 3, [0, 1, 2])


@pytest.mark.long
def test_adatoken_3d_drops_the_many_that_say_little():
  """Of ten tokens seven contribute less than 5 % together."""
  tokens = prompt('tvvvvvvvvvvt')
  flow = np.array([1, .5, .001, .5, .01, .01, .01, .01, .01, .01, .01, 1], np.float32)
  told = Signals(row_attention=jnp.asarray(flow)[None, None],
                 projected_norms=jnp.ones((1, 1, 12)))
  stays = left(AdaToken3D(), tokens.replace(), told, keep=9)
  gone = np.setdiff1d(np.arange(12), stays)
  assert flow[gone].sum() < 0.05 * flow[1:11].sum() <= flow[gone].sum() + 0.01
  assert len(gone) == 6
  np.testing.assert_array_equal(left(AdaToken3D(), tokens, told, keep=2), [0, 1, 3, 11])


def test_lemo_runs_the_blocks_that_are_attended_to():
  """A block is worth its best token; by a threshold fewer run than may."""
  tokens = TokenSet.create(jnp.zeros((1, 10, 2)), kind=jnp.full((1, 10), TEXT, jnp.int8),
                           of=(TEXT,))
  told = Signals(next_received_attention=jnp.asarray(
      [0, .1, 0, .01, .3, 0, .02, .01, 0, .15], jnp.float32)[None, None])
  runs = jax.jit(functools.partial(LeMo(block=2), num_slots=6))(tokens, told)
  np.testing.assert_array_equal(runs.src[0], [0, 1, 4, 5, 8, 9])
  some = jax.jit(functools.partial(LeMo(block=2, threshold=1.2), num_slots=6))(tokens, told)
  np.testing.assert_array_equal(some.src[0][np.asarray(some.valid[0])], [4, 5, 8, 9])
  assert int(some.wanted[0]) == 4


def test_still_compares_attention_with_a_token_and_without():
  rng = np.random.default_rng(5)
  slots, window, epsilon = 9, 4, 1e-3
  q, k = (rng.normal(size=(1, slots, heads, 8)).astype(np.float32) for heads in (4, 2))
  tokens = TokenSet.create(jnp.zeros((1, slots, 1)), kind=jnp.full((1, slots), TEXT, jnp.int8))
  found = jax.jit(STILL(window=window, epsilon=epsilon).scores)(
      tokens, Signals(queries=jnp.asarray(q), keys=jnp.asarray(k)))
  for head in range(2):
    for slot in range(1, slots):
      seen, own = np.arange(max(0, slot - window + 1), slot + 1), 0.0
      for query in q[0, slot, 2 * head:2 * head + 2]:
        share = np.exp(k[0, seen, head] @ query / np.sqrt(8))
        rest = np.append(share[:-1] / share[:-1].sum(), 0)
        share /= share.sum()
        # What is not there has a share of epsilon; elsewhere it does not count.
        own += share[:-1] @ np.log(share[:-1] / rest[:-1]) + share[-1] * np.log(
            (share[-1] + epsilon) / epsilon)
      np.testing.assert_allclose(found[0, head, slot], own / 2, rtol=1e-4)


def test_cmai_hides_from_words_what_they_do_not_focus_on():
  """By sums over the words that a word reads; the image attends as ever."""
  tokens = prompt('tvvvvvtttt')
  rng = np.random.default_rng(6)
  q, k, v = (jnp.asarray(rng.normal(size=(1, 10, heads, 8)), jnp.float32) for heads in (4, 2, 2))

  def mix(q, k, v, bias, positions):
    return attention.attend(q, k, v, bias=bias, positions=positions)

  @jax.jit
  def run(q, k, v):
    pattern = CMAI(share=0.4)(tokens, Signals(queries=q, keys=k), num_slots=10)
    return pattern.attend(mix, q, k, v, None, tokens.pos, causal=True)

  maps = np.asarray(attention.eager(q, k, positions=tokens.pos))[0]
  mean, words = maps.mean(axis=0), np.array([0, 6, 7, 8, 9])
  want = maps.copy()
  for word in words[1:]:
    focus = sum(mean[word, other] * mean[other, 1:6] for other in words)
    want[:, word, 1 + np.argsort(focus)[:2]] = 0
  want /= want.sum(axis=-1, keepdims=True)
  read = np.einsum('hnm,mhd->nhd', want, np.repeat(np.asarray(v)[0], 2, axis=1))
  np.testing.assert_allclose(run(q, k, v)[0], read, atol=1e-5)


@pytest.mark.long
def test_corematching_blanks_entries_of_a_models_caches():
  """Leaves what a prompt says as it is; what is decoded reads zeros in the layers named."""
  tokens = tiny_lm.image_and_text()
  plain = tiny_lm.prefill(tiny_lm.TINY, tokens)
  lm = tiny_lm.with_cache(method='corematching_cache', layers=(1, 2), visual=tiny_lm.VISUALS)
  logits, cache = tiny_lm.prefill(lm, tokens)
  np.testing.assert_array_equal(logits, plain[0])
  blank = [(np.asarray(layer.k[:, :, :tiny_lm.PROMPT]) == 0).all(axis=(1, 3))
           for layer in cache.layers]
  assert [each.any() for each in blank] == [False, True, True]
  assert not np.any(np.stack(blank)[:, np.asarray(tokens.kind) == TEXT])
  assert all(np.asarray(layer.valid)[..., :tiny_lm.PROMPT].all() for layer in cache.layers)


def text(units, seed=0):
  """One row of text, a letter a token: those with the same letter in a row are a unit; '.' none."""
  tokens = prompt(['t' if letter != '.' else '.' for letter in units], seed)
  return tokens.replace(of=(TEXT,), protected=0, stats={'unit': jnp.asarray(
      [[ord(letter) for letter in units]])})


def test_subtokens_of_a_unit_become_their_mean():
  """Units that meet again are others; of too many, neighbours merge, the most alike first."""
  tokens = text('abb.bcccab')
  x = np.asarray(tokens.x[0])
  @functools.partial(jax.jit, static_argnums=1)
  def run(tokens, num_slots):
    answer = SubtokenMerge()(tokens, Signals(), num_slots=num_slots)
    return answer, tk.reduce(tokens, answer)

  answer, reduced = run(tokens, 9)
  units = [[0], [1, 2, 4], [5, 6, 7], [8], [9]]
  assert int(answer.wanted[0]) == int(reduced.real.sum()) == len(units)
  for unit_, found in zip(units, np.asarray(reduced.x[0]), strict=False):
    np.testing.assert_allclose(found, x[unit_].mean(axis=0), atol=1e-6)
  tokens = tokens.replace(x=tokens.x.at[0, 9].set(tokens.x[0, 8]))
  _, few = run(tokens, 4)
  np.testing.assert_array_equal(few.owner[0], [0, 1, 1, -1, 1, 2, 2, 2, 3, 3])


def test_merging_subtokens_saves_what_the_paper_measures():
  """Between 1 and 19 % of the operations, where 1 to 18 % of 512 tokens are in a unit before."""
  lm = tiny_lm.TINY.clone(width=768, depth=12, mlp=2048, heads=12, kv_heads=12, head_width=64,
                          rope=tiny_lm.Rope(64), context=512)
  whole = lm_cost.of(lm, 512).macs
  for share, saved in ((0.01, 0.01), (0.18, 0.19)):
    merged = tiny_lm.planned(lm, 512, 0, method='subtoken_merge', token_kinds='text', layers=0,
                             keep=512 - round(512 * share))
    assert 1 - lm_cost.of(merged, 512).macs / whole == pytest.approx(saved, abs=0.01)


@functools.partial(jax.jit, static_argnums=(0, 3))
def explained_by_hand(lm, params, x, last):
  """Products of the maps of all layers, each with its gradient, as the formula is written."""
  blocks, norm = params['stack']['blocks'], rms_norm(lm.norm_eps)
  pos = jnp.arange(x.shape[1])[None]

  def logit(gates):
    maps, y = [], x
    for layer in range(lm.depth):
      own = jax.tree.map(lambda leaf, layer=layer: leaf[layer], blocks)
      h = norm.apply({'params': own['norm1']}, y)
      q, k, v = (jnp.einsum('bnd,dhe->bnhe', h, own[name]['kernel']) for name in 'qkv')
      q, k = (lm.rope.rotate(part, pos) for part in (q, k))
      k, v = (jnp.repeat(part, lm.heads // lm.kv_heads, axis=2) for part in (k, v))
      logits = jnp.einsum('bnhe,bmhe->bhnm', q, k) / np.sqrt(lm.head_width)
      seen = jnp.tril(jnp.ones(logits.shape[2:], bool))[None, None]
      maps.append(jax.nn.softmax(jnp.where(seen, logits, -jnp.inf), axis=3))
      read = jnp.einsum('bhnm,bmhe->bnhe', maps[-1] + gates[layer], v)
      y = y + jnp.einsum('bnhe,hed->bnd', read, own['out']['kernel'])
      h = norm.apply({'params': own['norm2']}, y)
      y = y + (jax.nn.silu(h @ own['gate']['kernel']) * (h @ own['up']['kernel'])
               ) @ own['down']['kernel']
    scores = norm.apply({'params': params['norm']}, y[:, last]) @ params['head']['kernel']
    return jnp.sum(scores.max(axis=1)), maps

  zeros = [jnp.zeros((len(x), lm.heads, x.shape[1], x.shape[1]))] * lm.depth
  grads, maps = jax.grad(logit, has_aux=True)(zeros)
  product = jnp.eye(x.shape[1])[None].repeat(len(x), 0)
  for gradient, own in zip(grads, maps, strict=True):
    product = product + jnp.maximum(own * gradient, 0).mean(axis=1) @ product
  return product[:, last]


def with_padding(tokens):
  """As many slots of padding behind the tokens."""
  blank = tokens.replace(valid=jnp.zeros(tokens.kind.shape, bool))
  return tk.join(tokens, blank).replace(padding='last')


@pytest.mark.long
def test_relevance_is_the_product_of_maps_times_gradients():
  lm, params = tiny_lm.TINY, tiny_lm.variables()['params']
  tokens = tiny_lm.image_and_text()
  wanted = explained_by_hand(lm, params, tokens.x, tiny_lm.PROMPT - 1)
  # Padding changes nothing, and has none.
  found = relevance(lm, {'params': params}, with_padding(tokens))
  np.testing.assert_allclose(found[:, :tiny_lm.PROMPT], wanted, rtol=1e-4)
  assert (np.asarray(found)[:, tiny_lm.PROMPT:] == 0).all()


@pytest.mark.long
def test_what_is_relevant_is_enough_at_the_input():
  """Without half of the visual tokens, before the first layer, the answer's logit stays nearer."""
  tokens = tiny_lm.image_and_text()
  params = tiny_lm.variables()
  scores = relevance(tiny_lm.TINY, params, with_padding(tokens))[:, :tiny_lm.PROMPT]
  lm = tiny_lm.planned(method='relevance_rank', layers=0, keep=3)
  read = jax.jit(lambda params, tokens: lm.apply(params, tokens)[0][:, -1])
  whole = jax.jit(lambda params, tokens: tiny_lm.TINY.apply(params, tokens)[0][:, -1])(
      params, tokens)
  most, least = (read(params, tokens.replace(stats={'relevance': sign * scores}))
                 for sign in (1, -1))
  best = jnp.argmax(whole, axis=1)[:, None]
  kept = [float(jnp.take_along_axis(logits, best, axis=1).mean())
          for logits in (whole, most, least)]
  assert kept[1] > kept[2]
  with pytest.raises(ValueError, match="they lack: add"):
    jax.eval_shape(read, params, tokens)


@pytest.mark.long
def test_a_language_model_holds_the_network_that_foresees_relevance():
  tokens = tiny_lm.image_and_text()
  lm = tiny_lm.planned(method='explained', layers=0, keep=3)
  variables = jax.eval_shape(lm.init, jax.random.key(0), tokens)
  assert variables['params']['stack']['reducer_00']['conv1']['kernel'].shape == (3, 4, 32)
  tokens = tokens.replace(stats={'relevance': jnp.ones(tokens.kind.shape)})
  logits, out = jax.eval_shape(
      functools.partial(lm.apply, rngs={'dropout': jax.random.key(0)}), variables, tokens)
  assert logits.shape == (3, 9, 29)
  assert out['losses']['relevance_00'].shape == (3,)


@pytest.mark.long
def test_a_small_network_foresees_relevance_in_longer_images():
  """It learns from 16 tokens which head tells, and that neighbours do, and finds it in 64."""
  method, rng = Explained(width=8), np.random.default_rng(8)

  def images(rows, length):
    paid = rng.uniform(0, 1, (rows, 2, length)).astype(np.float32) ** 2
    ends = np.pad(paid[:, 0], ((0, 0), (1, 1)))
    wanted = ends[:, :-2] + ends[:, 1:-1] + ends[:, 2:]
    tokens = TokenSet.create(jnp.zeros((rows, length, 1)), stats={'relevance': wanted})
    return tokens, Signals(next_row_attention=paid / paid.sum(axis=2, keepdims=True)), wanted

  tokens, told, _ = images(64, 16)
  params = method.init(jax.random.key(0), tokens, told, num_slots=8)

  def loss(params):
    _, sown = method.apply(params, tokens, told, num_slots=8, mutable=['losses'],
                           rngs={'dropout': jax.random.key(0)})
    return sown['losses']['relevance'][0].mean()

  rule = optax.adam(0.02)

  @jax.jit
  def learn(params):
    def step(state, _):
      params, slow = state
      value, grads = jax.value_and_grad(loss)(params)
      change, slow = rule.update(grads, slow)
      return (optax.apply_updates(params, change), slow), value

    (params, _), losses = jax.lax.scan(step, (params, rule.init(params)), None, 200)
    return params, losses

  learned, losses = learn(params)
  assert losses[-1] < 0.2 * losses[0]
  tokens, told, wanted = images(8, 64)
  best = np.argsort(-wanted, axis=1)[:, :32]

  pick = jax.jit(lambda params, tokens, told: method.apply(
      params, tokens, told, num_slots=32).src)

  def found(params):
    src = np.asarray(pick(params, tokens, told))
    return np.mean([len(np.intersect1d(*row)) / 32 for row in zip(src, best, strict=True)])

  assert found(learned) > 0.9 > found(params) + 0.2
  # Padding between tokens makes no other neighbours.
  kept = pick(learned, tokens, told)
  valid = jnp.tile(jnp.array([[True, False]]), (8, 64))
  wider = TokenSet.create(jnp.zeros((8, 128, 1)), valid=valid)
  told = Signals(next_row_attention=jnp.repeat(told.next_row_attention, 2, axis=2))
  np.testing.assert_array_equal(pick(learned, wider, told), 2 * kept)
