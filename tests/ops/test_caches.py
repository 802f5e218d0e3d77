"""Caches whose heads hold different numbers of entries, thin keys, or merged values.

Axes: B batch, N entries, M entries after, H heads, K kv heads, d features a head, C tokens of a
chunk.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops.caches.channels import KVChannels
from ops.caches.heads import KVHeads, page_size
from ops.caches.merge import KVMerge
from ops.kv_cache import KV, KVGather
from ops.rope import Rope

BATCH, SLOTS, HEADS, KV_HEADS, WIDTH, ROOM = 2, 24, 6, 3, 8, 4
ROPE = Rope(WIDTH)


def normal(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def prompt(*, bias=False, padded=False):
  """The cache of a prompt of two rows, the second of which may start late."""
  pos = jnp.broadcast_to(jnp.arange(SLOTS, dtype=jnp.int32), (BATCH, SLOTS))
  valid = jnp.ones((BATCH, SLOTS), bool)
  if padded:
    pos, valid = pos.at[1].add(-5).clip(0), valid.at[1, :5].set(False)
  return KV.create(
      normal(BATCH, KV_HEADS, SLOTS, WIDTH), normal(BATCH, KV_HEADS, SLOTS, WIDTH, seed=1), pos=pos,
      valid=valid, start=pos[:, -1] + 1, filled=SLOTS,
      bias=normal(BATCH, SLOTS, seed=7) if bias else None)


def hidden_where(kv, keep):
  """The same cache with entries hidden instead of gone, bool[B, K, N]."""

  def each_head(x):
    return None if x is None else jnp.broadcast_to(x[:, None], keep.shape)

  return kv.replace(pos=each_head(kv.pos), valid=each_head(kv.valid) & keep,
                    bias=each_head(kv.bias))


def unequal(kv, total):
  """Random entries, none of padding, as many in all as fit: none of the first head, if few."""
  rng = np.random.default_rng(3)
  weight = np.array([0.3, 0.8, 1.0])[None, :, None] * rng.random((BATCH, KV_HEADS, SLOTS))
  weight = np.where(np.asarray(kv.valid)[:, None], weight, -1)
  flat = weight.reshape(BATCH, -1)
  order = np.argsort(-flat, axis=1)[:, :total]
  keep = np.zeros(flat.shape, bool)
  np.put_along_axis(keep, order, True, axis=1)
  return jnp.asarray(keep.reshape(weight.shape))


@functools.partial(jax.jit, static_argnames=('window', 'steps'))
def decoded(kv, window=0, steps=2):
  """Returns what steps read, and a chunk of two behind them: float32[B, steps + 2, H, d]."""
  out = []
  for step in range(steps):
    index = kv.start + step
    kv = kv.append(normal(BATCH, KV_HEADS, WIDTH, seed=10 + step),
                   normal(BATCH, KV_HEADS, WIDTH, seed=20 + step), index, jnp.int32(step))
    out.append(kv.attend(normal(BATCH, HEADS, WIDTH, seed=30 + step), index, window)[0])
  index = (kv.start + steps)[:, None] + jnp.arange(2)[None]
  kv = kv.extend(normal(BATCH, 2, KV_HEADS, WIDTH, seed=40), normal(BATCH, 2, KV_HEADS, WIDTH,
                 seed=41), index, jnp.ones((BATCH, 2), bool), jnp.int32(steps))
  chunk = kv.attend_chunk(normal(BATCH, 2, HEADS, WIDTH, seed=42), index, window)
  return jnp.concatenate([jnp.stack(out, axis=1), chunk], axis=1)


@pytest.mark.long
@pytest.mark.parametrize(('total', 'window', 'bias', 'padded'), [
    (7, 9, True, True), pytest.param(30, 0, False, False, marks=pytest.mark.long)])
def test_entries_that_are_gone_read_as_those_that_are_hidden(total, window, bias, padded):
  kv = prompt(bias=bias, padded=padded)
  keep = unequal(kv, total)
  assert len(set(np.asarray(keep.sum(axis=2)).ravel())) > 2
  answer = KVHeads.create(keep, total)
  np.testing.assert_array_equal(answer.mask(SLOTS), keep)
  split = answer.shrink(kv, positions='keep', rope=ROPE).with_room(ROOM + 2)
  whole = hidden_where(kv, keep).with_room(ROOM + 2)
  np.testing.assert_allclose(decoded(split, window), decoded(whole, window), atol=2e-6)
  rows = jnp.array([1, 0])
  np.testing.assert_allclose(decoded(split.take(rows), window), decoded(whole.take(rows), window),
                             atol=2e-6)


@pytest.mark.long
def test_heads_number_their_own_entries_anew():
  kv = prompt(padded=True)
  keep = unequal(kv, 30)
  split = KVHeads.create(keep, 30).shrink(kv, positions='compact', rope=ROPE)
  np.testing.assert_array_equal(split.start, keep.sum(axis=2).max(axis=1))
  for row in range(BATCH):
    for head in range(KV_HEADS):
      at = np.flatnonzero(keep[row, head])
      own = np.asarray(split.prompt.head[row]) == head
      there = np.asarray(split.prompt.valid[row])[own]
      np.testing.assert_array_equal(np.asarray(split.prompt.pos[row])[own][there], range(len(at)))
      moved = ROPE.rotate(kv.k[row, head][at][:, None], jnp.arange(len(at)) - kv.pos[row, at])
      np.testing.assert_allclose(np.asarray(split.prompt.keys[row])[own][there], moved[:, 0],
                                 atol=1e-5)


@pytest.mark.parametrize(('heads', 'kept', 'size'), [
    (8, 8192, 256), (8, 1024, 32), (3, 102, 4), (2, 5, 1), (1, 10 ** 6, 256)])
def test_pages_add_little_to_what_heads_hold(heads, kept, size):
  total = heads * kept
  assert page_size(total, heads) == size
  shapes = jax.eval_shape(lambda keep: KVHeads.create(keep, total),
                          jax.ShapeDtypeStruct((1, heads, 2 * kept), bool))
  assert total <= shapes.src.size <= 1.05 * total


@pytest.mark.long
def test_all_entries_have_their_place_however_heads_share_them():
  counts = np.array([[0, 204, 102], [1, 103, 202], [101, 102, 103], [204, 102, 0]])
  keep = jnp.asarray(np.arange(204)[None, None] < counts[..., None])
  answer = KVHeads.create(keep, 306)
  np.testing.assert_array_equal(answer.valid.sum(axis=(1, 2)), 306)
  np.testing.assert_array_equal(answer.mask(204), keep)


@pytest.mark.parametrize('entries', [None, pytest.param(10, marks=pytest.mark.long)])
def test_channels_that_are_gone_read_as_zeros(entries):
  kv = prompt(padded=True)
  rng = np.random.default_rng(0)
  channels = np.sort(rng.permuted(np.tile(np.arange(WIDTH), (BATCH, KV_HEADS, 1)), axis=2)[..., :5])
  zeroed = np.zeros((BATCH, KV_HEADS, 1, WIDTH), np.float32)
  np.put_along_axis(zeroed, channels[:, :, None], 1.0, axis=3)
  kept = None
  if entries:
    src = rng.permuted(np.tile(np.arange(5, SLOTS), (BATCH, KV_HEADS, 1)), axis=2)[..., :entries]
    kept = KVGather(jnp.asarray(src, jnp.int32))
  thin = KVChannels(jnp.asarray(channels, jnp.int32), kept).shrink(
      kv, positions='keep', rope=ROPE)
  assert thin.prompt.keys.shape == (BATCH, KV_HEADS, entries or SLOTS, 5)
  whole = KV.create(kv.k * zeroed, kv.v, pos=kv.pos, valid=kv.valid, start=kv.start, filled=SLOTS)
  if kept is not None:
    whole = kept.shrink(whole, positions='keep', rope=ROPE)
  np.testing.assert_allclose(decoded(thin.with_room(6)), decoded(whole.with_room(6)), atol=2e-6)


@pytest.mark.long
def test_values_that_leave_are_averaged_with_those_that_follow():
  kv = prompt()
  rng = np.random.default_rng(2)
  src = np.sort(rng.permuted(np.tile(np.arange(SLOTS), (BATCH, KV_HEADS, 1)), axis=2)[..., :9])
  first = rng.integers(0, 10, (BATCH, KV_HEADS, SLOTS))
  weight = rng.random((BATCH, KV_HEADS, SLOTS)).astype(np.float32)
  got = KVMerge(KVGather(jnp.asarray(src, jnp.int32)), jnp.asarray(first, jnp.int32),
                jnp.asarray(weight), 3).shrink(kv, positions='keep', rope=ROPE)
  wanted = np.take_along_axis(np.asarray(kv.v), src[..., None], axis=2)
  total = np.ones(src.shape)
  for at in np.ndindex(*first.shape):
    places = slice(first[at], first[at] + 3)
    wanted[at[:2]][places] += weight[at] * np.asarray(kv.v)[at]
    total[at[:2]][places] += weight[at]
  np.testing.assert_allclose(got.v, wanted / total[..., None], atol=1e-5)
  np.testing.assert_array_equal(got.k, np.take_along_axis(np.asarray(kv.k), src[..., None], axis=2))
