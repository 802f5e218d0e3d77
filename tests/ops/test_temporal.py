"""Streams: temporal token fusion against the same in numpy, frame by frame.

Axes: F frames, B batch, N slots, P patches, S image side, D features.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops.temporal import LUMA, TTF, gray_patches
from ops.tokens import SPECIAL, VISUAL, TokenSet

FRAMES, BATCH, GRID, SIDE, WIDTH = 7, 3, (2, 3), 4, 5
PATCHES, SLOTS = 6, 7
RULE = TTF(threshold=0.1, attended=1, keyframe_every=4)


def video(seed=0):
  """Frames in which some patches change a little, some a lot; features and attention of each."""
  rng = np.random.default_rng(seed)
  shape = (BATCH, GRID[0] * SIDE, GRID[1] * SIDE, 3)
  step = rng.choice([0.0, 0.02, 0.4], size=(FRAMES, BATCH, GRID[0], GRID[1], 1))
  step = np.repeat(np.repeat(step, SIDE, axis=2), SIDE, axis=3)
  images = np.cumsum(step * rng.normal(size=(FRAMES, *shape)), axis=0) + rng.uniform(size=shape)
  x = rng.normal(size=(FRAMES, BATCH, SLOTS, WIDTH))
  attention = rng.uniform(size=(FRAMES, BATCH, SLOTS))
  return tuple(part.astype(np.float32) for part in (images, x, attention))


def tokens_of(x, valid=None):
  kind = np.where(np.arange(SLOTS) < 1, SPECIAL, VISUAL).astype(np.int8)
  return TokenSet.create(
      jnp.asarray(x), kind=jnp.tile(kind, (len(x), 1)), valid=valid, protected=1,
      pos=jnp.tile(jnp.arange(-1, PATCHES, dtype=jnp.int32), (len(x), 1)))


def oracle(images, x, attention, rule, starts):
  """The rule, one stream, one frame and one patch at a time."""
  fused, reused = np.array(x), np.zeros(x.shape[:3], bool)
  gray = images.astype(np.float64) @ np.array(LUMA)
  for b in range(x.shape[1]):
    for f in range(len(x)):
      best = np.argsort(-attention[f, b, 1:], kind='stable')[:rule.attended]
      for p in range(PATCHES):
        r, c = divmod(p, GRID[1])
        box = np.s_[b, r * SIDE:(r + 1) * SIDE, c * SIDE:(c + 1) * SIDE]
        if (f - starts[b]) % rule.keyframe_every == 0 or p in best:
          continue
        if np.abs(gray[f][box] - gray[f - 1][box]).mean() <= rule.threshold:
          fused[f, b, p + 1], reused[f, b, p + 1] = fused[f - 1, b, p + 1], True
  return fused, reused


def play(rule, images, x, attention, valid=None, starts=None):
  stream = rule.start(tokens_of(x[0]), images[0], grid=GRID)

  def step(stream, frame):
    index, image, features, seen = frame
    if starts is not None:
      stream = stream.replace(frame=jnp.where(index == starts, 0, stream.frame))
    stream, tokens, reused = rule(stream, tokens_of(features, valid), image, seen, grid=GRID)
    return stream, (tokens.x, reused)

  run = jax.jit(lambda *frames: jax.lax.scan(step, stream, (jnp.arange(len(x)), *frames))[1])
  return run(images, x, attention)


@pytest.mark.parametrize('rule', [
    RULE, TTF(0.1, 0, 100), TTF(0.0, 2, 3), TTF(10.0, 0, 2), TTF(0.1, 6, 5), TTF(10.0, 9, 9),
    TTF(10.0, 0, 1)], ids=str)
def test_fusion(rule):
  images, x, attention = video()
  expected, reused = oracle(images, x, attention, rule, starts=[0] * BATCH)
  found, mask = play(rule, images, x, attention)
  np.testing.assert_array_equal(mask, reused)
  np.testing.assert_array_equal(found, expected)
  if rule == RULE:
    assert 0 < reused[1:4].mean() < reused[1:4, :, 1:].mean() < 1
    assert not reused[[0, 4]].any()


def test_a_token_may_be_several_frames_old():
  images, x, attention = video()
  still = np.repeat(images[:1], FRAMES, axis=0)
  found, _ = play(TTF(0.1, 0, 4), still, x, attention)
  for frame in range(FRAMES):
    np.testing.assert_array_equal(found[frame, :, 1:], x[frame // 4 * 4, :, 1:])
  np.testing.assert_array_equal(found[:, :, 0], x[:, :, 0])


def test_streams_start_when_they_like_and_do_not_meet():
  images, x, attention = video()
  starts = jnp.array([0, 2, 3])
  found, mask = play(RULE, images, x, attention, starts=starts)
  for row, start in enumerate([0, 2, 3]):
    alone, alone_mask = play(RULE, *(part[start:, row:row + 1] for part in (images, x, attention)))
    np.testing.assert_array_equal(found[start:, row:row + 1], alone)
    np.testing.assert_array_equal(mask[start:, row:row + 1], alone_mask)


def test_padding_is_never_old_and_changes_nothing():
  images, x, attention = video()
  valid = jnp.arange(SLOTS)[None] != jnp.array([[2], [5], [9]])
  loud = np.where(valid, attention, 1e3).astype(np.float32)
  found, mask = play(RULE, images, x, loud, valid)
  quiet = np.where(valid, attention, -1).astype(np.float32)
  expected, expected_mask = play(RULE, images, x, quiet)
  real = np.broadcast_to(valid, mask.shape)
  assert not np.asarray(mask)[~real].any()
  np.testing.assert_array_equal(np.asarray(mask)[real], np.asarray(expected_mask)[real])
  np.testing.assert_array_equal(np.asarray(found)[real], np.asarray(expected)[real])


def test_gray_patches_are_luma_in_raster_order():
  images, _, _ = video()
  gray = np.asarray(gray_patches(images[0], grid=GRID))
  assert gray.shape == (BATCH, PATCHES, SIDE * SIDE)
  corner = images[0][1, SIDE:, 2 * SIDE:] @ np.array(LUMA, np.float32)
  np.testing.assert_allclose(gray[1, 5], corner.reshape(-1), atol=1e-6, rtol=0)
  single = np.asarray(gray_patches(images[0][..., :1], grid=GRID))
  np.testing.assert_array_equal(single[1, 5], images[0][1, SIDE:, 2 * SIDE:, 0].reshape(-1))


@pytest.mark.parametrize(('call', 'message'), [
    (lambda: TTF(-1.0, 0, 1), r'threshold=-1\.0 and attended=0 must not be negative'),
    (lambda: TTF(0.1, 0, 0), 'keyframe_every=0 at least 1'),
    (lambda: gray_patches(jnp.zeros((1, 9, 12, 3)), grid=GRID), '9 x 12 pixels do not divide into '
                                                              '2 x 3 patches'),
    (lambda: gray_patches(jnp.zeros((1, 8, 12, 4)), grid=GRID), '4 channels have no gray value'),
    (lambda: RULE(None, TokenSet.create(jnp.zeros((1, 5, WIDTH)), protected=1), None, None,
                  grid=GRID), '4 tokens cannot be fused from frame to frame, as a frame has 6'),
], ids=('negative', 'no keyframe', 'no grid', 'channels', 'slots'))
def test_errors(call, message):
  with pytest.raises(ValueError, match=message):
    call()
