"""Methods for videos behind the projector, against released code (tests/fixtures/video).

Every video is a row of a batch with videos of other lengths and sizes, between padding, with a
newline behind it.

Axes: B batch, N slots, F frames, W tokens of a frame, D features.
"""

import functools

import jax
import numpy as np
import pytest
from helpers import recorded

from ops import tokens as tk
from ops.primitives.crops.segments import contiguous
from ops.reducers.language.framefusion_merge import FrameFusionMerge
from ops.reducers.language.holitom_merge import HoliTomMerge
from ops.reducers.projector.dycoke import DyCoke
from ops.reducers.projector.evs import EVS
from ops.reducers.projector.fastvid import FastVID
from ops.reducers.projector.framefusion import FrameFusion
from ops.reducers.projector.holitom import HoliTom
from ops.reducers.projector.mustdrop_merge import MustDropMerge
from ops.reducers.projector.prunevid import PruneVid
from ops.reducers.projector.vidcom2 import VidCom2
from ops.signals import Signals
from ops.tokens import TEXT, VISUAL, TokenSet


def load(name):
  return recorded.arrays(f'video/{name}')


@functools.partial(jax.jit, static_argnums=0, static_argnames=('num_slots', 'grid', 'number'))
def compiled(method, x, valid, budget, told, *, num_slots, grid, number):
  tokens = TokenSet.create(x, valid=valid, budget=budget)
  told = told.replace(crop_grid=grid, num_crops=number)
  return tk.reduce(tokens, method(tokens, told, num_slots=num_slots))


def reduced(method, videos, kept, *, attention=None):
  """Reduces videos float[F, W, D] together: (position in its video, features) of each that is left.

  Args:
    kept: how many tokens each row keeps, its newline not counted.
    attention: float[F, W] of each, or None.
  """
  ahead = [0, 2, 1, 3][:len(videos)]
  sizes = [video.shape[0] * video.shape[1] for video in videos]
  slots = max(size + start + 1 for size, start in zip(sizes, ahead, strict=True))
  x = np.full((len(videos), slots, videos[0].shape[2]), 1e3, np.float32)
  crop = np.full(x.shape[:2], 1, np.int32)
  valid, received = crop == 0, np.ones((len(videos), 1, slots), np.float32)
  for row, (video, size, start) in enumerate(zip(videos, sizes, ahead, strict=True)):
    here = slice(start, start + size)
    x[row, here] = video.reshape(size, -1)
    x[row, start + size] = -1.0
    crop[row, here], crop[row, start + size] = np.repeat(np.arange(len(video)), video.shape[1]), -1
    valid[row, start:start + size + 1] = True
    if attention is not None:
      received[row, 0, here] = attention[row].reshape(-1)
  told = Signals(crop=crop, received_attention=received)
  widest = max(video.shape[1] for video in videos)
  left = compiled(method, x, valid, np.asarray(kept, np.int32) + 1, told, num_slots=max(kept) + 1,
                  grid=(1, widest), number=max(map(len, videos)) + 1)
  found = []
  for row, start in enumerate(ahead):
    real = np.asarray(left.real[row])
    place, features = np.asarray(left.pos[row])[real] - start, np.asarray(left.x[row])[real]
    assert place[-1] == sizes[row]
    np.testing.assert_array_equal(features[-1], -1.0)
    found.append((place[:-1], features[:-1]))
  return found


def check_kept(found, wanted):
  """The same tokens, whatever their order."""
  for (place, _), kept in zip(found, wanted, strict=True):
    np.testing.assert_array_equal(place, np.sort(kept))


def test_evs():
  raw = load('evs')
  masks = [raw[f'keep{rate}'] for rate in (50, 75, 90)]
  found = reduced(EVS(), [raw['x']] * 3, [mask.sum() for mask in masks])
  check_kept(found, [np.flatnonzero(mask) for mask in masks])


def test_evs_of_one_frame_and_of_less_than_one():
  raw = load('evs')
  found = reduced(EVS(), [raw['x'][:1], raw['x']], [7, 9])
  check_kept(found, [np.arange(7), np.arange(9)])


@pytest.mark.long
def test_vidcom2():
  raw = load('vidcom2')
  for case in range(2):
    # The other row has another share: each asks for all that there is.
    others = raw[f'x{1 - case}']
    found = reduced(VidCom2(share=float(raw[f'base{case}'])), [others, raw[f'x{case}']],
                    [others.shape[0] * others.shape[1], raw[f'x{case}'].size // 24])
    check_kept(found[1:], [raw[f'kept{case}']])


def test_vidcom2_goes_by_the_budget():
  raw = load('vidcom2')
  videos, budgets = [raw['x0'], raw['x1'], raw['x0'][:1]], [50, 45, 9]
  found = reduced(VidCom2(), videos, budgets)
  check_kept(found[:1], [raw['kept0']])
  for (place, _), budget in zip(found, budgets, strict=True):
    assert budget - 5 <= len(place) <= budget


def test_dycoke():
  raw = load('dycoke')
  videos, wanted = zip(*((raw[f'x{case}'], raw[f'kept{case}']) for case in range(4)), strict=True)
  budgets = [len(kept) for kept in wanted]
  found = reduced(DyCoke(variant='release'), videos, budgets)
  check_kept(found, wanted)
  places = [place // video.shape[1] for (place, _), video in
            zip(reduced(DyCoke(), videos, budgets), videos, strict=True)]
  for frames, video in zip(places, videos, strict=True):
    counts = np.bincount(frames, minlength=len(video))
    assert (counts[::4] == video.shape[1]).all()
    assert np.ptp(np.delete(counts, np.s_[::4])) <= 1
  # An odd last frame is there, and the third frame of the last four is cut as all others are.
  assert [max(frames) for frames in places] == [11, 8, 9, 10]


@pytest.mark.long
def test_dycoke_of_less_than_every_fourth_frame():
  video = load('dycoke')['x0']
  (place, _), = reduced(DyCoke(), [video], [30])
  np.testing.assert_array_equal(place, [*range(10), *range(80, 90), *range(160, 170)])


def check_features(found, kept, out):
  """The same tokens, each with its features."""
  order = np.argsort(kept)
  np.testing.assert_array_equal(found[0], kept[order])
  np.testing.assert_allclose(found[1], out[order], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(('case', 'by_share'), [
    (0, False), (1, True), pytest.param(2, False, marks=pytest.mark.long)])
def test_fastvid(case, by_share):
  raw = load('fastvid')
  share, count, threshold, context, every, alpha = raw[f'args{case}'].tolist()
  method = FastVID(segments=int(count), threshold=threshold, context=context, every=int(every),
                   alpha=alpha, share=share if by_share else None)
  video, attention = raw[f'x{case}'], raw[f'attention{case}']
  # A budget that divides evenly is that share.
  budget = len(video) * (video.shape[1] if by_share else int(video.shape[1] * share))
  found = reduced(method, [video[:1], video], [6, budget], attention=[attention[:1], attention])
  check_features(found[1], raw[f'kept{case}'], raw[f'out{case}'])
  assert len(found[0][0]) == 6


@pytest.mark.parametrize(('case', 'by_share'), [
    (0, True), *(pytest.param(case, case == 2, marks=pytest.mark.long) for case in (1, 2))])
def test_holitom(case, by_share):
  raw = load('holitom')
  share, threshold, context, beta, neighbours = raw[f'args{case}'].tolist()
  method = HoliTom(threshold=threshold, context=context, beta=beta, neighbours=int(neighbours),
                   share=share if by_share else None)
  video, attention = raw[f'x{case}'], raw[f'attention{case}']
  total = video.size // 16
  # By the budget the ratio is the same; rounding up asks for more than it, which is cut.
  budget = total if by_share else round(total * share)
  found = reduced(method, [video[:1], video], [5, budget], attention=[attention[:1], attention])
  if by_share:
    check_features(found[1], raw[f'kept{case}'], raw[f'out{case}'])
  else:
    assert len(raw[f'kept{case}']) > budget == len(found[1][0])
    here = np.isin(raw[f'kept{case}'], found[1][0])
    check_features(found[1], raw[f'kept{case}'][here], raw[f'out{case}'][here])
  assert len(found[0][0]) == 5 or by_share


def test_holitom_merge():
  raw, method = load('holitom_merge'), HoliTomMerge()
  x, attention = raw['x'], raw['attention']
  start, count = raw['image'].tolist()
  slots = np.arange(x.shape[1])
  kind = np.where((slots >= start) & (slots < start + count), VISUAL, TEXT).astype(np.int8)

  @jax.jit
  def run(x, attention):
    tokens = TokenSet.create(x, kind=kind[None])
    told = Signals(last_attention=attention)
    return tk.reduce(tokens, method(tokens, told, num_slots=len(raw['kept'])))

  left = run(x, attention)
  order = np.argsort(left.pos[0])
  np.testing.assert_array_equal(left.pos[0][order], raw['kept'])
  np.testing.assert_allclose(left.x[0][order], raw['out'], atol=1e-5)


@pytest.mark.parametrize('case', [0, pytest.param(1, marks=pytest.mark.long)])
def test_prunevid(case):
  raw = load('prunevid')
  threshold, scenes, share = raw[f'args{case}'].tolist()
  video = raw[f'x{case}']
  method = PruneVid(threshold=threshold, scenes=scenes, share=share)
  found = reduced(method, [video, video[:1]], [video.size // 16, video.shape[1]])
  check_sorted(found[0][1], raw[f'out{case}'])
  assert len(found[1][0]) == int(video.shape[1] * share)


@pytest.mark.long
def test_prunevid_goes_by_the_budget():
  video = load('prunevid')['x1']
  whole, = reduced(PruneVid(share=1.0), [video], [270])
  for budget in (9, 40, 97, len(whole[0]), 260):
    found, = reduced(PruneVid(), [video], [budget])
    # Rounding gives the first groups one more; nothing brings back what stands still.
    assert len(found[0]) == min(budget, len(whole[0]))


def check_sorted(found, wanted):
  """The same features, whatever their order."""
  assert found.shape == wanted.shape
  found, wanted = (values[np.argsort(values[:, 0])] for values in (found, wanted))
  np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_prunevid_scenes_are_runs():
  raw = load('prunevid')
  labels, wanted = raw['labels'], raw['refined']
  real = np.ones(labels.shape, bool)
  found = np.asarray(jax.jit(contiguous)(labels, real))
  # What clusters are called does not count.
  for row, other in zip(found, wanted, strict=True):
    np.testing.assert_array_equal(np.diff(row) != 0, np.diff(other) != 0)
  shorter = real & (np.arange(labels.shape[1]) < 7)
  found = np.asarray(jax.jit(contiguous)(labels, shorter))[:, :7]
  for row, other in zip(found, raw['refined_of_7'], strict=True):
    np.testing.assert_array_equal(np.diff(row) != 0, np.diff(other) != 0)


def test_framefusion():
  raw = load('framefusion')
  videos = [raw['x0'], raw['x1'], raw['x0'], raw['x1'][:1]]
  budgets = [len(raw['kept0']), len(raw['kept1']), 10, 7]
  found = reduced(FrameFusion(), videos, budgets)
  for case in range(2):
    check_features(found[case], raw[f'kept{case}'], raw[f'out{case}'])
  # Less than a frame: each place is one token, and the last ones are dropped.
  np.testing.assert_array_equal(found[2][0], np.arange(10))
  np.testing.assert_allclose(found[2][1], raw['x0'].mean(axis=0)[:10], atol=1e-5)
  np.testing.assert_array_equal(found[3][0], np.arange(7))


@pytest.mark.long
def test_framefusion_from_layer_to_layer():
  """Two videos in their prompts: merging above the threshold, up to the budget, and pruning."""
  raw, method = load('framefusion_layers'), FrameFusionMerge()
  prompts = [raw['x0'], raw['x1']]
  slots = max(map(len, prompts)) + 2
  x, valid = np.full((2, slots, 16), 1e3, np.float32), np.zeros((2, slots), bool)
  kind, frame = np.full((2, slots), VISUAL, np.int8), np.full((2, slots), -1)
  for row, (own, start) in enumerate(zip(prompts, (1, 0), strict=True)):
    before, frames, width, behind = raw[f'frames{row}']
    here = slice(start, start + len(own))
    x[row, here], valid[row, here] = own, True
    kind[row, here] = [TEXT] * before + [VISUAL] * frames * width + [TEXT] * behind
    frame[row, here] = [-1] * before + list(np.repeat(np.arange(frames), width)) + [-1] * behind
  pos = np.maximum(np.cumsum(valid, axis=1, dtype=np.int32) - 1, 0)
  tokens = TokenSet.create(x, pos=pos, valid=valid, kind=kind, protected=7,
                           stats={'frame': frame})
  tokens = tokens.replace(stats=tokens.stats | method.watch(tokens, Signals()))
  for step in range(3):
    # The second video is done one step before the first: nothing is left to do.
    last = [min(step, 2 - row) for row in range(2)]
    kept = [raw[f'kept{row}_{number}'] for row, number in enumerate(last)]
    received = np.zeros((2, 1, tokens.slots), np.float32)
    if step == 1:
      received[1, :, np.asarray(tokens.real[1])] = raw['received1_1'].mean(axis=0)[:, None]
    tokens = tokens.replace(budget=np.array([len(own) - 7 for own in kept], np.int32))
    num_slots = max(map(len, kept))
    tokens = tk.reduce(tokens, jax.jit(functools.partial(method, num_slots=num_slots))(
        tokens, Signals(received_attention=received)))
    x = np.array(tokens.x)
    for row, number in enumerate(last):
      real = np.asarray(tokens.real[row])
      order = np.argsort(np.asarray(tokens.pos[row])[real])
      found = np.asarray(tokens.pos[row])[real][order]
      np.testing.assert_array_equal(found, kept[row])
      if number == step:
        np.testing.assert_allclose(x[row, real][order], raw[f'out{row}_{step}'], atol=1e-5)
        x[row, np.flatnonzero(real)[order]] += raw[f'add{row}_{step}']
    tokens = tokens.replace(x=x)


def test_mustdrop():
  raw, grid = load('mustdrop'), (8, 8)
  x, budgets = raw['x'], [len(raw['out0']), len(raw['out1'])]
  method = MustDropMerge()

  @jax.jit
  def run(x, budget):
    tokens = TokenSet.create(x, budget=budget)
    return tk.reduce(tokens, method(tokens, Signals(grid=grid), num_slots=max(budgets)))

  left = run(x, np.asarray(budgets, np.int32))
  for row in range(2):
    real = np.asarray(left.real[row])
    found = np.asarray(left.pos[row])[real], np.asarray(left.x[row])[real]
    check_features(found, raw[f'kept{row}'], raw[f'out{row}'])
    assert np.asarray(left.size[row])[real].sum() == grid[0] * grid[1]


OTHERS = (VidCom2, DyCoke, FastVID, HoliTom, PruneVid, FrameFusion)


@pytest.mark.parametrize('method', [
    EVS, *(pytest.param(method, marks=pytest.mark.long) for method in OTHERS)])
def test_newlines_alone_stay(method):
  (place, _), = reduced(method(), [np.ones((2, 3, 4), np.float32)], [0])
  assert not len(place)


@pytest.mark.long
@pytest.mark.parametrize('method', [EVS, *OTHERS])
def test_no_more_newlines_stay_than_the_budget_has_room_for(method):
  crop = np.array([[0, 0, -1, 0, 0, -1], [-1, -1, -1, -1, 0, 0]], np.int32)
  x = np.random.default_rng(0).normal(size=(2, 6, 4)).astype(np.float32)
  told = Signals(crop=crop, received_attention=np.ones((2, 1, 6), np.float32))
  left = compiled(method(), x, np.ones(crop.shape, bool), np.array([4, 2], np.int32), told,
                  num_slots=4, grid=(2, 2), number=1)
  counts = np.asarray(left.real).sum(axis=1)
  assert counts[0] <= 4
  assert counts[1] == 2
  assert {2, 5} <= set(np.asarray(left.pos[0])[np.asarray(left.real[0])].tolist())
  np.testing.assert_array_equal(np.asarray(left.pos[1])[np.asarray(left.real[1])], [0, 1])
