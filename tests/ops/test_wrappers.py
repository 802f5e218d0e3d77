"""Methods on the cache that hold another: where one setting makes them that method, and references.

Axes: B batch, N entries, M entries after, H heads, K kv heads, d features a head.
"""

import functools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.plan import make_method
from ops import signals
from ops.caches.heads import KVHeads
from ops.kv_cache import KV
from ops.reducers.cache import CACHE_REDUCERS
from ops.rope import Rope
from ops.signals import Signals
from ops.tokens import TokenSet

BATCH, SLOTS, HEADS, KV_HEADS, WIDTH, KEEP = 2, 30, 6, 3, 8, 12
ROPE = Rope(WIDTH)
SNAPKV = {'method': 'snapkv', 'args': {'window': 4, 'kernel': 3, 'variant': 'kvpress'}}
HELD = {'inner': SNAPKV}


@functools.cache
def measured():
  """Tokens of two rows, and all signals of them."""
  rng = np.random.default_rng(0)
  q, k, v = (jnp.asarray(rng.normal(size=(BATCH, SLOTS, heads, WIDTH)), jnp.float32)
             for heads in (HEADS, KV_HEADS, KV_HEADS))
  pos = jnp.broadcast_to(jnp.arange(SLOTS, dtype=jnp.int32), (BATCH, SLOTS))
  kernel = jnp.asarray(rng.normal(size=(HEADS, WIDTH, 12)), jnp.float32)
  names = frozenset({'keys', 'values', 'queries', 'window_attention', 'last_attention',
                     'received_attention'})
  told = jax.jit(functools.partial(signals.measure, names, lse=None, span=4))(
      q=q, k=k, v=v, positions=pos)
  return (TokenSet.create(jnp.zeros((BATCH, SLOTS, 1)), pos=pos),
          told.replace(plain_queries=q, rope=ROPE,
                       projected_norms=signals.projected_norms(v, kernel)))


def made(name, **args):
  return make_method(name, args, CACHE_REDUCERS)


def kept(name, keep=KEEP, **args):
  """The entries that stay, bool[B, K, N]."""
  answer = jax.jit(functools.partial(made(name, **args), num_slots=keep))(*measured())
  if isinstance(answer, KVHeads):
    return np.asarray(answer.mask(SLOTS))
  flags = np.zeros((BATCH, KV_HEADS, SLOTS), bool)
  valid = np.ones(answer.src.shape, bool) if answer.valid is None else np.asarray(answer.valid)
  for at in np.argwhere(valid):
    flags[*at[:2], answer.src[*at]] = True
  return flags


def test_a_held_method_is_told_the_share_that_stays():
  for name in ('adakv', 'chunk', 'two_stage'):
    told = made(name, inner={'method': 'compactor'}).with_ratio(Fraction(1, 4))
    assert told.inner.blend == 0.75
  assert made('chunk').with_ratio(Fraction(1, 4)).share == 0.25


def ranked(name, keep=KEEP, **args):
  return np.asarray(made(name, **args).ranking(*measured(), num_slots=keep))


@pytest.mark.parametrize(('name', 'args'), [
    ('criticalkv', {'first_stage': 1.0}), ('pyramidkv', {}), *(
        pytest.param(*case, marks=pytest.mark.long) for case in (
            ('adakv', {'safeguard': 1.0}), ('chunk', {'length': 99}),
            ('two_stage', {'factor': 1.0}),
            ('criticaladakv', {'safeguard': 1.0, 'first_stage': 1.0})))], ids=str)
def test_a_wrapper_without_a_part_is_what_it_holds(name, args):
  np.testing.assert_array_equal(kept(name, **HELD, **args), kept('snapkv', **SNAPKV['args']))


@pytest.mark.long
def test_heads_earn_their_numbers():
  scores, flags = ranked('snapkv', **SNAPKV['args']), kept('adakv', **HELD)
  counts = flags.sum(axis=2)
  np.testing.assert_array_equal(counts.sum(axis=1), KV_HEADS * KEEP)
  assert len(set(counts.ravel())) > 1
  safe = np.sort(scores, axis=2)[:, :, -int(0.2 * KEEP):]
  for row in range(BATCH):
    out = np.max(scores[row][~flags[row]])
    for head in range(KV_HEADS):
      inside = scores[row, head][flags[row, head]]
      assert (inside[inside < out] >= safe[row, head].min()).all()
  # CriticalAdaKV chooses others, but as many of each head.
  critical = kept('criticaladakv', **HELD)
  np.testing.assert_array_equal(critical.sum(axis=2), counts)
  assert (critical != flags).any()
  np.testing.assert_array_equal(kept('criticaladakv', **HELD, first_stage=1.0), flags)


@pytest.mark.long
def test_values_count_in_the_second_stage():
  scores, flags = ranked('snapkv', **SNAPKV['args']), kept('criticalkv', **HELD)
  norms = np.asarray(measured()[1].projected_norms).reshape(BATCH, KV_HEADS, 2, SLOTS).mean(axis=2)
  for at in np.ndindex(BATCH, KV_HEADS):
    order = list(np.argsort(-scores[at], kind='stable'))
    first, rest = order[:KEEP // 2], order[KEEP // 2:]
    second = sorted(rest, key=lambda n: -(scores[at][n] + 1e-4) * norms[at][n])
    assert set(np.flatnonzero(flags[at])) == {*first, *second[:KEEP - KEEP // 2]}


@pytest.mark.long
def test_chunks_stay_whole():
  flags = kept('chunkkv', **HELD, length=7, share=0.4)
  scores = ranked('snapkv', **SNAPKV['args']).sum(axis=1)
  for row in range(BATCH):
    means = [scores[row, at:at + 7].mean() for at in range(0, SLOTS, 7)]
    best = np.argsort(means)[::-1][:int(0.4 * 5)]
    # The last one is short; of 14 entries in two whole ones the budget leaves 12.
    wanted = [entry for chunk in best for entry in range(7 * chunk, min(7 * chunk + 7, SLOTS))]
    np.testing.assert_array_equal(flags[row], np.isin(np.arange(SLOTS), wanted[:KEEP])[None]
                                  .repeat(KV_HEADS, 0))


@pytest.mark.long
def test_parts_are_cut_one_by_one():
  flags = kept('chunk', inner={'method': 'knorm'}, length=8, share=0.4)
  keys = -np.linalg.norm(np.asarray(measured()[1].keys), axis=3).swapaxes(1, 2)
  for at in np.ndindex(BATCH, KV_HEADS):
    wanted = [start + n for start in range(0, SLOTS, 8)
              for n in np.argsort(-keys[at][start:start + 8])[:int(0.4 * min(8, SLOTS - start))]]
    assert set(np.flatnonzero(flags[at])) == set(wanted)
  # Attention within a part: the first ones see nothing of the others.
  tokens, told = measured()
  alone = signals.measure(frozenset({'last_attention'}), q=told.queries[:, :8], k=told.keys[:, :8],
                          v=told.values[:, :8], lse=None, positions=tokens.pos[:, :8])
  seen = np.asarray(alone.last_attention.mean(axis=1))
  part = kept('chunk', inner={'method': 'tova'}, length=8, share=0.4)[:, :, :8]
  for row in range(BATCH):
    wanted = {7, *np.argsort(-seen[row, :7])[:2]}
    assert all(set(np.flatnonzero(head)) == wanted for head in part[row])


@pytest.mark.long
def test_entries_that_leave_are_merged_by_their_attention():
  answer = made('cam', **HELD, merged=3)(*measured(), num_slots=KEEP)
  flags, told = kept('snapkv', **SNAPKV['args']), measured()[1]
  received = np.asarray(told.received_attention).reshape(BATCH, KV_HEADS, 2, SLOTS).mean(axis=2)
  weights = np.zeros((BATCH, KV_HEADS, SLOTS, KEEP))
  for at in np.ndindex(BATCH, KV_HEADS):
    stay = np.flatnonzero(flags[at])
    for entry in np.flatnonzero(~flags[at]):
      places = np.flatnonzero(stay > entry)[:3]
      chance = received[at][entry] / received[at][stay[places]].mean()
      weights[*at, entry, places] = min(chance, 1) / len(places)
    np.testing.assert_array_equal(answer.kept.src[at], stay)
  place = np.arange(KEEP)
  first = np.asarray(answer.first)[..., None]
  got = np.where((place >= first) & (place < first + 3), np.asarray(answer.weight)[..., None], 0)
  np.testing.assert_allclose(got, weights, atol=1e-5)


@pytest.mark.long
def test_channels_that_matter_least_to_the_last_queries_go():
  answer = made('think', window=4, prune=0.4)(*measured(), num_slots=SLOTS)
  told = measured()[1]
  queries = np.square(np.asarray(told.queries)[:, -4:]).mean(axis=1)
  queries = queries.reshape(BATCH, KV_HEADS, 2, WIDTH).mean(axis=2)
  importance = queries * np.square(np.asarray(told.keys)).mean(axis=1)
  assert answer.entries is None
  np.testing.assert_array_equal(answer.channels, np.sort(np.argsort(importance)[..., 3:]))


@pytest.mark.long
def test_questions_weigh_their_attention_by_what_they_see():
  tokens, told = measured()
  rows = np.asarray(told.window_attention) * np.arange(SLOTS - 4, SLOTS)[None, None, :, None]
  wanted = rows.mean(axis=2).reshape(BATCH, KV_HEADS, 2, SLOTS).mean(axis=2)
  got = made('finch', window=4).scores(tokens, told)
  np.testing.assert_allclose(got[:, :, :-4], wanted[:, :, :-4], atol=1e-5)


@pytest.mark.parametrize(('name', 'args', 'message'), [
    ('adakv', {'inner': {'method': 'simlayerkv'}}, 'AdaKV cannot hold SimLayerKV as its inner, wh'),
    ('adakv', {'inner': {'method': 'adakv'}}, 'AdaKV cannot hold AdaKV as its inner, which gives'),
    ('think', {'inner': {'method': 'adakv'}}, 'ThinK cannot hold AdaKV as its inner, which gives'),
    ('chunk', {'inner': {'method': 'rkv'}}, 'chunk cannot hold RKV, which reads window_queries, n'),
    ('adakv', {'inner': {'method': 'snap'}}, "method 'snap' is unknown (did you mean 'snapkv'?)"),
    ('adakv', {'inner': {'args': {}}}, 'adakv: args.inner lacks method: set them'),
    ('adakv', {'inner': 'snapkv'}, "adakv: args.inner='snapkv' must be a dict of keys"),
    ('adakv', {'inner': {'method': 'snapkv', 'window': 3}}, "args.inner has no key 'window': ch"),
    ('adakv', {'safeguard': 1.5}, 'adakv: args.safeguard=1.5 must be from 0 to 1'),
    ('two_stage', {'factor': 0.5}, 'factor=0.5 must be at least 1'),
], ids=str)
def test_what_a_wrapper_cannot_hold_is_refused_in_a_line(name, args, message):
  with pytest.raises(ValueError) as caught:  # noqa: PT011
    made(name, **args)
  assert message in str(caught.value)
  assert '\n' not in str(caught.value)


def test_the_value_of_what_leaves_while_decoding_is_divided_by_attention():
  """As the release's loop, whose draws are put as their mean; slots in no order."""
  rng = np.random.default_rng(5)
  rows, heads, slots, width, merged = 2, 2, 9, 4, 3
  pos = np.stack([rng.permutation(20)[:slots] for _ in range(rows * heads)])
  attention = rng.dirichlet(np.ones(slots), size=(rows * heads, 1)).astype(np.float32)
  values = rng.normal(size=(rows, heads, slots, width)).astype(np.float32)
  method = made('cam', inner={'method': 'streaming_llm', 'args': {'sinks': 2}}, merged=merged)
  valid = np.ones(pos.shape, bool)
  valid[3, 4] = False  # With an empty slot nothing leaves.
  tokens = TokenSet.create(jnp.zeros((*pos.shape, 1)), pos=jnp.asarray(pos, jnp.int32),
                           valid=jnp.asarray(valid))
  signals = Signals(last_attention=jnp.asarray(attention),
                    keys=jnp.zeros((rows * heads, slots, 1, width)))

  @jax.jit
  def step(tokens, signals, values):
    stays = method.evict(tokens, signals, num_slots=slots - 1)
    shape = rows, heads, -1
    kv = KV.create(values, values, pos=tokens.pos.reshape(shape), valid=tokens.real.reshape(shape),
                   start=jnp.zeros((rows,), jnp.int32), filled=0)
    given = method.absorb(tokens, signals, stays).reshape(shape)
    return stays, kv.absorb(stays.reshape(shape), given).v

  stays, found = step(tokens, signals, values)
  for row in range(rows * heads):
    order = np.argsort(pos[row])
    mine = values.reshape(-1, slots, width)[row].copy()
    if row < 3:
      gone, behind = order[2], order[3:]  # The oldest that is no sink.
      assert not stays[row, gone]
      chance = min(attention[row, 0, gone] / attention[row, 0, behind].mean(), 1)
      mine[behind[:merged]] += mine[gone] * chance / merged
    np.testing.assert_array_equal(stays[row].sum(), slots - 1)
    np.testing.assert_allclose(found.reshape(-1, slots, width)[row], mine, atol=1e-6)
