"""Methods between a vision tower and a language model against released code.

Exact indices, 1e-5 for floats.

Axes: B batch, N patches, C crops, D features.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import recorded
from helpers.golden_vit import arrays

from models.backbones.qwen_vision import QwenVision
from ops import tokens as tk
from ops.primitives import farthest
from ops.primitives.contextual import order_over_crops
from ops.primitives.quantiles import outliers
from ops.primitives.queries import whole_attention
from ops.reducers.projector.aim_merge import AIMMerge
from ops.reducers.projector.divprune import DivPrune
from ops.reducers.projector.duet_zip import DUETZip
from ops.reducers.projector.fastervlm import FasterVLM
from ops.reducers.projector.hiprune import HiPrune
from ops.reducers.projector.prumerge import PruMerge
from ops.reducers.projector.visionzip import VisionZip
from ops.reducers.projector.vtc_cls import VTCCLS
from ops.signals import Signals, measure_map
from ops.tokens import SPECIAL, VISUAL, TokenSet


def load(name):
  return recorded.arrays(f'vlm_pre/{name}')


def close(got, want):
  np.testing.assert_allclose(got, want, atol=1e-5, rtol=0)


def tokens_of(x, cls, **fields):
  kind = np.where(np.arange(x.shape[1]) < cls, SPECIAL, VISUAL).astype(np.int8)
  return TokenSet.create(jnp.asarray(x), protected=int(cls), **fields,
                         kind=jnp.broadcast_to(kind, x.shape[:2]))


@functools.partial(jax.jit, static_argnums=0, static_argnames=('num_slots', 'cls'))
def compiled(method, x, told, *, num_slots, cls=False, **fields):
  tokens = tokens_of(x, cls, **fields)
  answer = method(tokens, told, num_slots=num_slots)
  return answer, tk.reduce(tokens, answer)


def operate(*args, **settings):
  """The assignment and the reduced tokens; [CLS] stands first where `cls` says so."""
  return arrays(compiled(*args, **settings))


@functools.partial(jax.jit, static_argnames='count')
def spread_out(x, first, *, count):
  """Whose turn it is, and how near the nearest is."""
  every = jnp.ones(x.shape[:2], bool)
  return (farthest.farthest_first(x, every, first, count=count),
          farthest.largest_cosine(x, every, chunk=7))


@pytest.mark.parametrize('case', [0, 1])
def test_divprune(case):
  raw = load(f'divprune_case{case}')
  x, keep = raw['features'][None], int(raw['num_keep'])
  answer, _ = operate(DivPrune(), x, Signals(), num_slots=keep)
  np.testing.assert_array_equal(answer.src[0], raw['kept_sorted'])
  turn, nearest = arrays(spread_out(x, raw['selected_in_order'][:1], count=keep))
  np.testing.assert_array_equal(np.argsort(turn[0])[:keep], raw['selected_in_order'])
  if case == 1:
    distance = raw['distance'] + 9 * np.eye(64, dtype=np.float32)
    close(1 - nearest[0], distance.min(axis=1))


def test_divprune_takes_the_last_when_more_are_wanted_than_there_are():
  x = np.random.default_rng(0).normal(size=(1, 6, 4)).astype(np.float32)
  _, reduced = operate(DivPrune(), x, Signals(), num_slots=5,
                       valid=np.array([[True, False, True, True, False, False]]))
  np.testing.assert_array_equal(reduced.pos[reduced.valid], [0, 2, 3])


@pytest.mark.parametrize('case', [0, 1])
def test_fastervlm(case):
  raw = load(f'fastervlm_case{case}')
  told = Signals(cls_attention=raw['cls_attn'])
  answer, reduced = operate(FasterVLM(), raw['features'], told, num_slots=int(raw['keep']))
  close(told.cls_attention.mean(axis=1), raw['score'])
  np.testing.assert_array_equal(answer.src, raw['kept_indices'])
  np.testing.assert_array_equal(reduced.x, raw['kept_features'])


def test_fastervlm_on_crops_stands_in_the_order_of_the_whole_image():
  """Crops are rows that keep equally many; their tokens then stand by position in the image."""
  raw, side = load('fastervlm_anyres'), 24
  keep = int(raw['keep_per_crop'])
  crops = side * side + np.arange(4 * side * side).reshape(2, side, 2, side).transpose(0, 2, 1, 3)
  place = np.concatenate([np.arange(side * side)[None], crops.reshape(4, -1)]).astype(np.int32)
  told = Signals(cls_attention=raw['cls_attn'][:, None])
  _, reduced = operate(FasterVLM(), raw['features_tagged'], told, num_slots=keep, pos=place)
  order = np.argsort(reduced.pos.reshape(-1))
  found = reduced.x.reshape(-1, 4)[order]
  np.testing.assert_array_equal(found[:, 0], raw['out_crop_ids'])
  np.testing.assert_array_equal(found[:, 1], raw['out_token_ids'])
  np.testing.assert_array_equal(found, raw['out_features'])


def zipped(raw, hidden, attention, *, dominant, contextual):
  """Reduces tokens with [CLS] first by VisionZip."""
  told = Signals(cls_attention=attention, keys=raw['key_metric'][:, :, None])
  answer, reduced = operate(VisionZip(contextual=contextual), hidden, told, cls=True,
                            num_slots=dominant + contextual)
  return reduced, answer


@pytest.mark.parametrize('case', [0, 1])
def test_visionzip(case):
  raw = load(f'visionzip_case{case}')
  dominant, contextual = int(raw['dominant']), int(raw['contextual'])
  reduced, answer = zipped(raw, raw['hidden_states'], raw['cls_attn'], dominant=dominant,
                           contextual=contextual)
  np.testing.assert_array_equal(answer.src[:, :dominant], raw['dominant_indices_sorted'])
  close(reduced.x, raw['out_tokens'])


def test_visionzip_on_crops():
  raw = load('visionzip_anyres_restore')
  attention = np.pad(raw['cls_attn_headsum'], ((0, 0), (1, 0)))[:, None]
  reduced, answer = zipped(raw, raw['hidden_states_tagged'], attention, dominant=10, contextual=3)
  np.testing.assert_array_equal(answer.src[:, :10], np.sort(raw['all_indices'], axis=1))
  # Means of some 190 numbers of a size up to 576: relative above a size of 1.
  np.testing.assert_allclose(reduced.x, raw['per_crop_tokens'], atol=1e-5, rtol=1e-5)
  crops = np.arange(4 * 576).reshape(2, 24, 2, 24).transpose(0, 2, 1, 3).reshape(4, 576)
  place = np.take_along_axis(np.pad(crops, ((0, 0), (1, 0))), reduced.pos, axis=1)
  order = np.asarray(order_over_crops(place, reduced.kind, contextual=3))
  np.testing.assert_allclose(reduced.x.reshape(-1, 4)[order], raw['restored'], atol=1e-5, rtol=1e-5)


def test_contextual_tokens_follow_the_budget():
  """The release's counts, 54 + 10, 108 + 20 and 162 + 30; each row of a batch has its own."""
  method = VisionZip(share=10 / 64)
  assert [method._num_contextual(count) for count in (64, 128, 192)] == [10, 20, 30]
  raw = load('visionzip_case0')
  _, counted = zipped(raw, raw['hidden_states'], raw['cls_attn'], dominant=109, contextual=20)
  hidden, attention, keys = (np.repeat(raw[name], 3, axis=0)
                             for name in ('hidden_states', 'cls_attn', 'key_metric'))
  told = Signals(cls_attention=attention, keys=keys[:, :, None])
  answer, _ = operate(method, hidden, told, cls=True, num_slots=193,
                            budget=np.array([64, 128, 192], np.int32))
  np.testing.assert_array_equal(answer.valid.sum(axis=1), [65, 129, 193])
  np.testing.assert_array_equal(answer.src[1, :129], counted.src[0])
  np.testing.assert_array_equal(np.where(answer.dst[1] < 193, answer.dst[1], 0), counted.dst[0])


def test_visionzip_of_the_paper_averages():
  """All that a contextual token stands for, in place of the mean of the others beside its own."""
  raw = load('visionzip_case1')
  dominant, contextual = int(raw['dominant']), int(raw['contextual'])
  told = Signals(cls_attention=raw['cls_attn'], keys=raw['key_metric'][:, :, None])
  answer, reduced = operate(VisionZip(contextual=contextual, variant='paper'),
                            raw['hidden_states'], told, cls=True, num_slots=dominant + contextual)
  np.testing.assert_array_equal(answer.src[:, :dominant], raw['dominant_indices_sorted'])
  for row, features in enumerate(raw['hidden_states']):
    for output in range(dominant, dominant + contextual):
      close(reduced.x[row, output], features[answer.dst[row] == output].mean(axis=0))
      assert (answer.dst[row] == output).any()


@pytest.mark.parametrize('case', [0, 1])
@pytest.mark.long
def test_aim_merges_in_rounds(case):
  raw = load(f'aim_merge_case{case}')
  for name in ('after1', 'after0'):
    _, reduced = operate(AIMMerge(), raw['x'], Signals(), num_slots=raw[name].shape[1])
    close(reduced.x, raw[name])


@pytest.mark.long
def test_duet_zip_merges_the_next_tokens_alone():
  """By hand: two of eight are dominant, and the next four make two contextual ones."""
  attention = np.array([5, 1, 8, 4, 2, 6, 3, 7.])
  keys = np.eye(8)[[0, 1, 2, 3, 4, 5, 6, 7]]
  keys[3] = [0, 0, 0, 1, 0, 1, 0, 0]  # Like slot 5, and not like slot 0.
  keys[0] = [1, 0, 0, 0, 0, 0, 0, 0]
  x = np.random.default_rng(0).normal(size=(1, 8, 3)).astype(np.float32)
  told = Signals(cls_attention=attention[None, None].astype(np.float32),
                 keys=keys[None, :, None].astype(np.float32))
  _, reduced = operate(DUETZip(contextual=2, width=2), x, told, num_slots=4)
  # By attention: 2, 7 | 5, 0, 3, 6 | 4, 1. Anchors are every second of the four: 5 and 3; slots 0
  # and 6 are like neither, and join the first in raster order, 3.
  np.testing.assert_array_equal(reduced.pos, [[2, 7, 3, 5]])
  close(reduced.x[0, 2], x[0, 3] + (x[0, 0] + x[0, 6]) / 2)
  close(reduced.x[0, 3], x[0, 5])
  np.testing.assert_array_equal(reduced.owner, [[2, -1, 0, 2, -1, 3, 2, 1]])


def test_vtc_cls():
  raw, method = load('vtc_cls_case0'), VTCCLS()
  layers = raw['cls_attn_all_layers_headmean'][:, None, None, 1:]
  tokens = TokenSet.create(jnp.asarray(raw['hidden_states'][:, 1:]))
  # 24 layers, of which the last makes features that are not used.
  watched = method.watched((22,))
  assert watched == tuple(range(int(raw['start_layer']), 23))
  watch = jax.jit(method.watch)
  for layer in watched:
    stats = watch(tokens, Signals(cls_attention=layers[layer]))
    tokens = tokens.replace(stats=tokens.stats | stats)
  close(np.asarray(tokens.stats['attended'])[0], raw['score'])
  answer, reduced = operate(method, tokens.x, Signals(cls_attention=layers[22]),
                            num_slots=int(raw['keep']), stats=tokens.stats)
  np.testing.assert_array_equal(answer.src[0], raw['kept_sorted'])
  np.testing.assert_array_equal(reduced.x, raw['out_tokens'])


@pytest.mark.parametrize('case', [0, 1, 2])
def test_hiprune(case):
  raw = load(f'hiprune_case{case}')
  method = HiPrune(alpha=float(raw['alpha']))
  crops = len(raw['index_mask'])
  x = np.zeros((crops, 576, 1), np.float32)
  middle, deep = (raw[f'{name}_attn_received'][:, None, 1:] for name in ('object', 'deep'))
  stats = jax.jit(lambda x, told: method.watch(TokenSet.create(x), told))(
      x, Signals(received_attention=middle))
  grid = tuple(int(side) for side in raw['grid'])
  answer, _ = operate(method, x, Signals(received_attention=deep, grid=grid), stats=stats,
                      num_slots=int(raw['retention_total']) // crops)
  np.testing.assert_array_equal((answer.dst < answer.src.shape[1]), raw['index_mask'] > 0)


@pytest.mark.parametrize(('name', 'variant'), [
    ('case0', 'paper'), ('case1', 'paper'), ('case0', 'release'), ('quirk_case3', 'release')])
def test_hiprune_for_qwen(name, variant):
  """An image of its own grid, beside one that fills the slots; there 1 is the mean of attention."""
  raw = load(f'hiprune_qwen_{name}')
  slots, alpha = len(raw['deep_attn']), round(float(raw['alpha']), 1)
  keep = round(slots * round(float(raw['retain_ratio']), 3))
  method = HiPrune(alpha=alpha, grid='own', variant=variant, patches=1)

  def rows(values):
    own = np.pad(values, (0, 20), constant_values=9)
    return np.stack([own, own[::-1]])[:, None].astype(np.float32)

  # The release sums over queries, a host takes their mean.
  told = Signals(received_attention=rows(raw['deep_attn'] / slots),
                 grids=np.array([raw['grid_hw'], [20, (slots + 20) // 20]], np.int32))
  valid = np.arange(slots + 20)[None] < np.array([[slots], [slots + 20]])
  _, reduced = operate(
      method, np.zeros((2, slots + 20, 1), np.float32), told, num_slots=keep + 5,
      stats={'object': rows(raw['object_attn'])[:, 0]}, valid=valid,
      budget=np.array([keep, keep + 5], np.int32))
  wanted = np.flatnonzero(raw['select_mask'])
  np.testing.assert_array_equal(reduced.pos[0][reduced.valid[0]], wanted)
  assert (len(wanted) < keep) == ('quirk' in name)
  # Prompt positions follow: what is before the image and behind it stays where it was.
  before = int(raw['num_prefix_text'])
  places = np.concatenate([np.arange(before), before + wanted, before + slots + np.arange(2)])
  np.testing.assert_array_equal(places, raw['kept_sequence_positions'])


def test_attention_of_a_merged_token_is_that_of_its_patches():
  """The tower has patches in raster order, the release in the order of its windows."""
  raw = load('hiprune_qwen_attn_pool')
  rows, columns = np.indices((6, 8)).reshape(2, -1)
  cell, part = rows // 2 * 4 + columns // 2, rows % 2 * 2 + columns % 2
  place = 4 * raw['reverse_indices'][cell] + part
  raster = raw['attn_weights'][:, place][:, :, place]
  told = measure_map(frozenset({'received_attention'}), raster[None], q=None, k=None, v=None)
  tower = QwenVision(8, 1, 8, 1, 8, (6, 8))
  cells = tower._cells(told.received_attention.mean(axis=1)).mean(axis=2)
  close(np.asarray(cells)[0] * len(place), raw['pooled'])


def prumerge(raw, method, *, num_slots):
  """Reduces tokens with [CLS] first by PruMerge; attention is compared on the way."""
  batch, slots, _ = raw['hidden_states'].shape
  queries, keys = (raw[f'{name}_proj_out'] for name in 'qk')
  attention = jax.jit(lambda x, *args: whole_attention(tokens_of(x, cls=True), *args))(
      raw['hidden_states'], queries, keys)
  close(np.asarray(attention)[:, 1:], raw['cls_attn'])
  told = Signals(queries=queries.reshape(batch, slots, 4, -1),
                 keys=keys.reshape(batch, slots, 4, -1))
  return operate(method, raw['hidden_states'], told, num_slots=num_slots, cls=True)


@pytest.mark.parametrize('case', [0, 1])
def test_prumerge(case):
  raw = load(f'prumerge_case{case}')
  answer, reduced = prumerge(raw, PruMerge(), num_slots=1 + raw['out_tokens'].shape[1])
  np.testing.assert_array_equal(answer.src[:, 1:-1] - 1, raw['topk_indices_first'])
  close(reduced.x[:, 1:], raw['out_tokens'])


@pytest.mark.parametrize(('name', 'keeps', 'capacity'), [
    ('case0', 'outliers', 64), ('plus_case3', 'spaced', 200)])
def test_prumerge_counts_its_outliers(name, keeps, capacity):
  """The number of tokens is found; slots beyond it are padding."""
  raw = load(f'prumerge_{name}')
  answer, reduced = prumerge(raw, PruMerge(keeps=keeps), num_slots=capacity)
  count = 1 + raw['out_tokens'].shape[1]
  np.testing.assert_array_equal(answer.wanted, count)
  np.testing.assert_array_equal(answer.valid[0], np.arange(capacity) < count)
  first = raw['topk_indices_first'][0]
  np.testing.assert_array_equal(answer.src[0, 1:1 + len(first)] - 1, first)
  close(reduced.x[:, 1:count], raw['out_tokens'])


@pytest.mark.long
def test_prumerge_plus_lets_its_spaced_tokens_go_where_they_do_not_fit():
  raw = load('prumerge_plus_case3')
  answer, _ = prumerge(raw, PruMerge(keeps='spaced'), num_slots=60)
  first, attention = raw['topk_indices_first'][0], raw['cls_attn'][0]
  assert answer.valid.all()
  assert answer.wanted == 1 + raw['out_tokens'].shape[1]
  np.testing.assert_array_equal(answer.src[0, 1:36] - 1, first)
  step = 576 // 35 // 3
  spaced = np.setdiff1d(np.arange(0, 575, step), first)
  best = spaced[np.argsort(-attention[spaced])[:23]]
  np.testing.assert_array_equal(answer.src[0, 36:59] - 1, np.sort(best))


@pytest.mark.long
def test_outliers_of_each_row():
  """The release takes the quartiles of a whole batch."""
  raw = load('prumerge_iqr')
  found = np.asarray(jax.jit(outliers)(raw['attn'], np.ones(raw['attn'].shape, bool)))
  np.testing.assert_allclose(found.mean(axis=1), raw['ratio_each'], atol=1e-6)
  flat = np.asarray(outliers(raw['attn'].reshape(1, -1), np.ones((1, found.size), bool)))
  np.testing.assert_allclose(flat.mean(), raw['ratio_flat'], atol=1e-6)
  among = np.arange(576)[None] < np.array([[401], [2]])
  found = np.asarray(jax.jit(outliers)(raw['attn'], among))
  values = raw['attn'][0, :401]
  low, high = np.quantile(values, [0.25, 0.75])
  np.testing.assert_array_equal(found[0, :401], values > high + 1.5 * (high - low))
  assert not found[0, 401:].any()
  assert not found[1].any()
