"""ToMe and PiToMe against the outputs of released code: exact indices, floats within 1e-5."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import golden_vit, mostly_long

from ops import assignments
from ops import tokens as tk
from ops.assignments import Gather
from ops.budgets import Limits, constant_or_inflected, resolve
from ops.primitives.match import cosine
from ops.reducers.vision.pitome import PiToMe, elu_energy
from ops.reducers.vision.tome import ToMe
from ops.reducers.vision.tome_kth import ToMeKth
from ops.signals import Signals
from ops.tokens import SPECIAL, VISUAL, TokenSet

same = np.testing.assert_array_equal
close = functools.partial(np.testing.assert_allclose, atol=1e-5, rtol=0)


def given(x, *, protected=0, size=None):
  """Golden features as tokens, special ones first."""
  batch, slots, _ = x.shape
  kind = np.where(np.arange(slots) < protected, SPECIAL, VISUAL).astype(np.int8)
  return TokenSet.create(
      jnp.asarray(x), kind=np.tile(kind, (batch, 1)), protected=protected,
      size=None if size is None else size[..., 0])


@functools.partial(jax.jit, static_argnums=(0, 3))
def ask(method, tokens, metric, num_slots):
  """A method's answer to a metric, given as the keys of one head."""
  return method(tokens, Signals(keys=metric[:, :, None]), num_slots=num_slots)


reduce = jax.jit(tk.reduce)


@jax.jit
def applied(tokens, merge, out):
  """Every way in which the release can apply one matching."""
  plain = tokens.replace(size=None)
  mean = assignments.Merge.mean(merge.src, merge.dst, plain.sizes)
  return {'sized': tk.reduce(tokens, merge), 'unsized': tk.reduce(plain, mean),
          'mean': mean.apply(tokens.x), 'max': merge.replace(op='max').apply(tokens.x),
          'picked': Gather(merge.src, tokens.slots).apply(tokens.x), 'back': merge.restore(out)}


def check_merges(raw, case, tokens, merge):
  found = golden_vit.arrays(applied(tokens, merge, raw[f'{case}_out']))
  sized, unsized = found['sized'], found['unsized']
  close(sized.x, raw[f'{case}_out'])
  close(sized.size, raw[f'{case}_out_size'][..., 0])
  same(sized.owner[:, None] == np.arange(sized.slots)[None, :, None], raw[f'{case}_source'] > 0)
  close(unsized.x, raw[f'{case}_out_nosize'])
  close(unsized.size, raw[f'{case}_out_nosize_size'][..., 0])
  # The release's mode 'mean' takes the destination in, which is the same thing.
  close(found['mean'], raw[f'{case}_out_mean'])
  return found


@pytest.mark.parametrize('case', ['a', 'b', 'c'])
def test_tome(case):
  raw = golden_vit.load('tome')
  protected = int(raw[f'{case}_class_token'])
  tokens = given(raw[f'{case}_x'], protected=protected, size=raw[f'{case}_size'])
  removed = int(raw[f'{case}_r'])
  cut, = resolve({'remove': removed}, Limits(
      1, tokens.slots, protected, 0, functools.partial(ToMe().min_slots, protected=protected)))
  assert cut.slots_in - cut.slots_out == raw[f'{case}_r_effective']
  merge = ask(ToMe(), tokens, raw[f'{case}_metric'], cut.slots_out)

  odd = np.broadcast_to(np.arange(1, tokens.slots, 2), (len(tokens.x), tokens.slots // 2))
  same(merge.src, np.concatenate([2 * raw[f'{case}_unm_idx'], odd], axis=1))
  ends = np.take_along_axis(merge.dst, 2 * raw[f'{case}_src_idx'], axis=1)
  same(ends, raw[f'{case}_unm_idx'].shape[1] + raw[f'{case}_dst_idx'])
  found = check_merges(raw, case, tokens, merge)
  close(found['max'], raw[f'{case}_out_amax'])
  close(found['back'], raw[f'{case}_unmerge'])


def test_tome_with_distillation_token():
  """[CLS] and the distillation token lead; restoring follows the slots to where they went.

  The release's own inverse takes outputs to be the even slots left, then the odd ones. With two
  special tokens in front they are not: it hands slots, the distillation token first, what belongs
  to others. Expected values come from the rule in plain numpy.
  """
  rng = np.random.default_rng(0)
  x, metric = (rng.normal(size=(2, 18, 8)).astype(np.float32) for _ in range(2))
  tokens = given(x, protected=2)
  merge = ask(ToMe(), tokens, metric, 13)
  ours = np.asarray(reduce(tokens, merge).x)
  restore = jax.jit(merge.restore)
  merge = golden_vit.arrays(merge)
  for row in range(2):
    unit = metric[row] / np.linalg.norm(metric[row], axis=1, keepdims=True)
    scores = unit[2::2] @ unit[3::2].T
    sources = np.argsort(-scores.max(1))[:5]
    partner = np.arange(18)
    partner[2 + 2 * sources] = 3 + 2 * scores.argmax(1)[sources]
    stays = [slot for slot in range(2, 18) if partner[slot] == slot]
    order = [0, 1] + [slot for slot in stays if slot % 2 == 0] + list(range(3, 18, 2))
    same(merge.src[row], order)
    same(merge.dst[row], [order.index(slot) for slot in partner])
    means = np.stack([x[row][partner == slot].mean(0) for slot in order])
    close(ours[row], means)
    back = np.asarray(restore(means[None].repeat(2, 0)))[row]
    close(back, np.stack([x[row][partner == end].mean(0) for end in partner]))
    left = [slot for slot in range(0, 18, 2) if partner[slot] == slot]
    released = np.zeros_like(back)
    released[left], released[1::2] = means[:len(left)], means[len(left):]
    close(back[1], x[row, 1])
    assert np.abs(released[1] - x[row, 1]).max() > 0.1, 'here the released inverse is right'


def test_tome_kth():
  """The release cuts 14 tokens to 12, a multiple of k = 3; given those 12 we do the same."""
  raw = golden_vit.load('tome')
  tokens = given(raw['kth3_x'][:, :12])
  merge = ask(ToMeKth(), tokens, raw['kth3_metric'][:, :12], 4)
  same(merge.src, np.broadcast_to([2, 5, 8, 11], (2, 4)))
  reduced = reduce(tokens, merge)
  close(reduced.x, raw['kth3_out'])
  close(reduced.size, raw['kth3_size'][..., 0])
  close(jax.jit(merge.restore)(reduced.x), raw['kth3_unmerge'])
  whole = given(raw['kth3_x'])
  merge = ask(ToMeKth(), whole, raw['kth3_metric'], 4)
  same(merge.src, np.broadcast_to([2, 6, 9, 13], (2, 4)))
  same(np.asarray(reduce(whole, merge).size).sum(1), [14, 14])


def test_tome_schedules():
  raw = golden_vit.load('tome')
  names = [name for name in raw if name.startswith('schedule_')]
  assert len(names) == 6
  for name in names:
    depth, remove, inflection = name.removeprefix('schedule_').split('_')
    inflection = float(inflection.removeprefix('inflect'))
    same(constant_or_inflected((int(remove[1:]), inflection), int(depth[1:])), raw[name])


@functools.cache
def run(method, args=(), **budget):
  """The tiny ViT under one plan, compiled once: logits and everything beside them."""
  return golden_vit.run({'method': method, 'args': dict(args), **budget})


def check_model(raw, case, logits, out):
  close(logits, raw[f'{case}_logits'])
  for layer in range(golden_vit.DEPTH):
    golden_vit.close(out['hidden'][layer], raw[f'{case}_block{layer}'])
  tokens = out['tokens']
  close(tokens.size, raw[f'{case}_size'][..., 0])
  same(tokens.owner[:, None] == np.arange(tokens.slots)[None, :, None], raw[f'{case}_source'] > 0)


@pytest.mark.long
@pytest.mark.parametrize(('case', 'args'), [('r8', ()), ('r8_noprop', (('proportional', False),))])
def test_tome_vit(case, args):
  check_model(golden_vit.load('tome_vit'), case, *run('tome', args, remove=8))


def test_tome_in_the_benchmark():
  """The Haurum benchmark's ToMe: keep ratios 0.7 and 0.49, and which token went where."""
  raw = golden_vit.load('haurum_tome')
  logits, out = run('tome', layers=(1, 2), keep_ratio=0.7, ratio_of='start', rounding='floor')
  first, second = out['cuts'][1], out['cuts'][2]
  assert (first.slots, second.slots) == (65 - 20, 65 - 20 - 13)
  close(logits, raw['k70_logits'])
  for layer in (1, 2, 3):
    golden_vit.close(out['hidden'][layer], raw[f'k70_Features_block{layer}'])
  # Maps are numbered without [CLS], and the second from the first one's outputs.
  ends = np.asarray(first.owner)[:, 1:] - 1
  same(ends, raw['k70_Assignment_Maps_block1'])
  again = np.take_along_axis(raw['k70_Assignment_Maps_block2'], ends, axis=1)
  same(np.asarray(second.owner)[:, 1:] - 1, again)


@pytest.mark.parametrize('case', ['a', 'b', 'c', 't0', 't1'])
def test_pitome(case):
  raw = golden_vit.load('pitome')
  text, protected = case.startswith('t'), int(raw[f'{case}_class_token'])
  tokens = given(raw[f'{case}_x'], protected=protected, size=raw.get(f'{case}_size'))
  cut, = resolve({'keep_ratio': float(raw[f'{case}_ratio'])}, Limits(1, tokens.slots, protected))
  assert cut.slots_in - cut.slots_out == raw[f'{case}_r']
  method = PiToMe(pairing='text' if text else 'energy', margin=float(raw[f'{case}_margin']))
  merge = ask(method, tokens, raw[f'{case}_metric'], cut.slots_out)

  a, b, alone = (raw[f'{case}_{name}_idx'] + protected for name in ('a', 'b', 'protected'))
  lead = np.zeros((len(a), protected), int)
  same(merge.src, np.concatenate([lead, alone, b], axis=1))
  same(np.take_along_axis(merge.dst, a, axis=1),
       lead.shape[1] + alone.shape[1] + raw[f'{case}_dst_idx'])
  if text:
    reduced = reduce(tokens, merge)
    close(reduced.x, raw[f'{case}_out'])
    close(reduced.size, raw[f'{case}_out_size'][..., 0])
    return
  metric = raw[f'{case}_metric']
  energy = jax.jit(lambda metric, tokens: elu_energy(cosine(metric, metric), tokens.free,
                                                     method.margin))(metric, tokens)
  close(np.asarray(energy)[:, protected:], raw[f'{case}_energy'])
  close(check_merges(raw, case, tokens, merge)['picked'], raw[f'{case}_out_prune'])


@pytest.mark.long
def test_pitome_vit():
  raw = golden_vit.load('pitome_vit')
  logits, out = run('pitome', layers='all', keep_ratio=0.9, rounding='ceil')
  slots = [65] + [out['cuts'][layer].slots for layer in range(golden_vit.DEPTH)]
  assert slots == [65, 59, 54, 49, 45]
  # The release's counter: 12 N D^2 + 2 N^2 D with the tokens that enter each block.
  width = golden_vit.WIDTH
  assert sum(12 * n * width ** 2 + 2 * n ** 2 * width for n in slots[:-1]) == raw['q90_flop']
  check_model(raw, 'q90', logits, out)


def test_pitome_pairing_by_layer():
  """The first half of the layers, the middle one included, pairs one way, the rest the other."""
  def pairings(name):
    return [PiToMe(pairing=name).pairing_at(layer, 5) for layer in range(5)]

  assert pairings('deit') == ['bipartite'] * 3 + ['energy'] * 2
  assert pairings('mae') == ['energy'] * 3 + ['bipartite'] * 2
  assert pairings('text') == ['text'] * 5
  with pytest.raises(ValueError, match='choose one of deit, mae, energy, bipartite, text'):
    PiToMe(pairing='energetic')


def test_pitome_leaves_at_least_half():
  for slots in range(4, 30):
    assert slots - PiToMe().min_slots(slots, 1) == (slots - 1) // 2
  with pytest.raises(ValueError, match='can leave no fewer than 33'):
    run('pitome', layers=1, keep_ratio=0.4)


@pytest.mark.long
@pytest.mark.parametrize('pairing', ['energy', 'bipartite', 'text'])
def test_pitome_padding(pairing):
  """Left or right padding full of 1e3 changes nothing, in a batch or alone."""
  rng = np.random.default_rng(2)
  slots, wide, method = 15, 19, PiToMe(pairing=pairing)
  x = rng.normal(size=(2, slots, 8)).astype(np.float32)
  metric = rng.normal(size=(2, slots, 8)).astype(np.float32)
  tokens = given(x, protected=1)
  places = np.arange(wide - slots, wide), np.arange(slots)
  valid = np.zeros((2, wide), bool)
  padded = [np.full((2, wide, 8), 1e3, np.float32) for _ in range(2)]
  kind = np.full((2, wide), VISUAL, np.int8)
  for row, place in enumerate(places):
    valid[row, place], kind[row, place] = True, tokens.kind[row]
    padded[0][row, place], padded[1][row, place] = x[row], metric[row]
  ragged = TokenSet.create(jnp.asarray(padded[0]), kind=jnp.asarray(kind), protected=1,
                           valid=jnp.asarray(valid))
  expected = golden_vit.arrays(reduce(tokens, ask(method, tokens, metric, 11)))
  got = golden_vit.arrays(reduce(ragged, ask(method, ragged, padded[1], 11)))
  same(got.valid, np.ones((2, 11), bool))
  close(got.x, expected.x)
  close(got.size, expected.size)
  alone = jax.tree.map(lambda leaf: leaf[1:], golden_vit.arrays(ragged))
  single = reduce(alone, ask(method, alone, padded[1][1:], 11))
  same(np.asarray(single.x)[0], got.x[1])
  short = reduce(ragged, ask(method, ragged, padded[1], 17))
  same(np.asarray(short.valid).sum(1), [slots, slots])


@pytest.mark.parametrize('dtype', mostly_long([jnp.float32, jnp.bfloat16]))
def test_pitome_finite(dtype):
  """Equal and all-zero tokens give finite features and gradients, however they are paired."""

  def total(x):
    tokens = given(x, protected=1)
    answers = [ask(PiToMe(pairing=pairing), tokens, x, 10)
               for pairing in ('energy', 'bipartite', 'text')]
    features = [tk.reduce(tokens, answer).x for answer in answers]
    assert all(x.dtype == dtype for x in features)
    return jnp.sum(jnp.stack(features).astype(jnp.float32))

  call = jax.jit(jax.value_and_grad(total))
  for value in (0.0, 1.0):
    out, grad = call(jnp.full((2, 17, 8), value, dtype))
    assert jnp.isfinite(out)
    assert jnp.isfinite(grad).all()
