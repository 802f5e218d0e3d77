"""Methods behind the projector that read the prompt, the tower's features or the projector itself.

Against released code: exact indices, 1e-5 for floats.

Axes: B batch, N patches, D features, C features of the tower, T words.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import recorded
from helpers.golden_vit import arrays

from ops import tokens as tk
from ops.primitives.match import l2_normalize
from ops.primitives.quantiles import by_each_others_variance, local_outliers, quantile
from ops.reducers.projector.cdpruner import CDPruner, most_diverse
from ops.reducers.projector.flashvlm import FlashVLM
from ops.reducers.projector.gprune import GPrune
from ops.reducers.projector.mmtok import MMTok, cover, shares
from ops.reducers.projector.recoverable import Recoverable
from ops.reducers.projector.visiontrim import VisionTrim, local_importance
from ops.reducers.projector.zoo_prune import ZOOPrune
from ops.signals import Signals
from ops.tokens import SPECIAL, TokenSet


def load(name):
  return recorded.arrays(f'vlm_pre/{name}')


def close(got, want):
  np.testing.assert_allclose(got, want, atol=1e-5, rtol=0)


@functools.partial(jax.jit, static_argnums=0, static_argnames=('num_slots', 'protected', 'grid'))
def compiled(method, x, told, *, num_slots, grid=None, **fields):
  told = told.replace(grid=grid)
  tokens = TokenSet.create(jnp.asarray(x), **fields)
  if fields.get('protected'):
    tokens = tokens.replace(kind=tokens.kind.at[:, :1].set(SPECIAL))
  answer = method(tokens, told, num_slots=num_slots)
  return answer, tk.reduce(tokens, answer)


def operate(method, x, told, **settings):
  """The assignment and the reduced tokens."""
  return arrays(compiled(method, x, Signals(**told), **settings))


def prompt(text, *, slots=0):
  """Signals of the words float[T, D] of one row, padded to `slots`."""
  padded = np.full((1, max(slots, len(text)), text.shape[1]), 1e3, np.float32)
  padded[0, :len(text)] = text
  return {'text': padded, 'text_valid': np.arange(padded.shape[1])[None] < len(text)}


def mmtok(raw):
  return MMTok(text_temperature=float(raw['tv_temp']), vision_temperature=float(raw['vv_temp']),
               alpha=float(raw['alpha']))


@pytest.mark.parametrize('padding', [0, 5])
def test_mmtok(padding):
  raw = load('mmtok_case0')
  told = prompt(raw['text'], slots=len(raw['text']) + padding) | {
      'vision_features': raw['vision_encoder'][None]}
  answer, reduced = operate(mmtok(raw), raw['vision_projected'][None], told,
                            num_slots=int(raw['keep']))
  np.testing.assert_array_equal(answer.src[0], raw['kept_sorted'])
  np.testing.assert_array_equal(reduced.x[0], raw['out_tokens'])


def test_mmtok_without_the_padding_of_an_image():
  """What may not be picked is to be covered all the same."""
  raw, method = load('mmtok_case1'), mmtok(load('mmtok_case1'))
  slots = len(raw['vision_encoder'])
  among = ~np.isin(np.arange(slots), raw['excluded'])

  @jax.jit
  def turns(text, x, features):
    text, x, features = (l2_normalize(each[None]) for each in (text, x, features))
    every, words = jnp.ones((1, slots), bool), jnp.ones((1, text.shape[1]), bool)
    covered = jnp.concatenate([
        shares(text, x, words, every, method.text_temperature),
        method.alpha * shares(features, features, every, every, method.vision_temperature)], axis=1)
    return cover(covered, jnp.asarray(among)[None], count=int(raw['keep']))

  turn = np.asarray(turns(raw['text'], raw['vision_projected'], raw['vision_encoder']))[0]
  np.testing.assert_array_equal(np.flatnonzero(turn < raw['keep']), raw['kept_sorted'])


def test_mmtok_of_a_row_without_words_covers_the_image():
  rng = np.random.default_rng(0)
  x, text = (rng.normal(size=shape).astype(np.float32) for shape in ((1, 9, 4), (2, 4)))
  told = prompt(text) | {'vision_features': x}
  none = told | {'text_valid': np.zeros((1, 2), bool)}
  answer, _ = operate(MMTok(), x, none, num_slots=3)
  by_hand, _ = operate(MMTok(alpha=1e6), x, told, num_slots=3)
  np.testing.assert_array_equal(answer.src, by_hand.src)


class Given(ZOOPrune):
  """Takes the directions of the recording."""

  def draw(self, width):
    return l2_normalize(load('zoo_prune_case0')['directions_raw'])


@pytest.mark.parametrize('variant', ['derivative', 'differences'])
def test_zoo_prune(variant):
  raw = load('zoo_prune_case0')
  method = Given(variant=variant, step=float(raw['h']))
  project = jax.tree_util.Partial(
      lambda w1, b1, w2, x: jax.nn.gelu(x @ w1 + b1[None, None], approximate=False) @ w2,
      *(jnp.asarray(raw[name]) for name in ('W1', 'b1', 'W2')))
  importance = jax.jit(lambda x: method.sensitivity(project, x, method.draw(0)))(
      raw['encoder_features'])[0]
  # Differences cancel: the recording itself is that far from the derivative.
  np.testing.assert_allclose(importance, raw['importance'], rtol=1e-4)
  told = {'vision_features': raw['encoder_features'], 'project': project}
  answer, _ = operate(method, raw['projected'], told, num_slots=int(raw['num_keep']))
  np.testing.assert_array_equal(answer.src[0], raw['kept_sorted'])


@pytest.mark.parametrize('case', [0, 1])
def test_cdpruner(case):
  """Rows of a batch that the release ran one by one."""
  raw = load(f'cdpruner_case{case}')
  real = np.arange(raw['text'].shape[1]) < raw['words'][:, None]
  told = {'text': raw['text'], 'text_valid': real}
  answer, _ = operate(CDPruner(), raw['features'], told, num_slots=int(raw['keep']))
  np.testing.assert_array_equal(answer.src, raw['kept_sorted'])


def test_picks_of_all_rows_at_once_are_those_of_one_after_another(trace_for):
  """As accelerators run them, and as CPUs do."""
  rng = np.random.default_rng(0)
  x = rng.normal(size=(3, 12, 8)).astype(np.float32)
  among = np.arange(12) < np.array([[12], [9], [4]])
  length = rng.uniform(0.5, 2, (3, 12)).astype(np.float32)

  def turns():
    found = [jax.jit(lambda x, among: most_diverse(x, length, among, count=6))(x, among),
             jax.jit(lambda x, among: cover(jnp.abs(x.swapaxes(1, 2)), among, count=6))(x, among)]
    return [np.asarray(each) for each in found]

  wanted = turns()
  trace_for('cuda')
  for found, each in zip(turns(), wanted, strict=True):
    np.testing.assert_array_equal(found, each)
    assert ((found < 6) <= among).all()
    assert (found < 6).sum(axis=1).tolist() == [6, 6, 4]


def test_cdpruner_goes_on_where_all_is_spanned():
  """Five tokens in a plane: two span it, and the first of the others fill up."""
  x = np.array([[[1, 0], [2, 0], [1, 1], [0, 1], [-1, 1]]], np.float32)
  told = {'text': np.zeros((1, 1, 2), np.float32), 'text_valid': np.zeros((1, 1), bool)}
  answer, _ = operate(CDPruner(), x, told, num_slots=3)
  np.testing.assert_array_equal(answer.src[0], [0, 1, 3])


@pytest.mark.parametrize('padding', [0, 3])
def test_flashvlm(padding):
  raw = load('flashvlm_case0')
  x = raw['features'] @ raw['projector_W']
  told = prompt(raw['text'][0], slots=raw['text'].shape[1] + padding) | {
      'cls_attention': raw['cls_attn'], 'vision_features': raw['features']}
  answer, reduced = operate(FlashVLM(eta=float(raw['eta'])), x, told, num_slots=int(raw['keep']))
  np.testing.assert_array_equal(answer.src, raw['kept_sorted'])
  close(reduced.x, raw['out_tokens'])


def test_flashvlm_of_a_row_without_words_goes_by_attention():
  raw = load('flashvlm_case0')
  told = prompt(raw['text'][0]) | {'cls_attention': raw['cls_attn'],
                                   'vision_features': raw['features']}
  x, keep = raw['features'] @ raw['projector_W'], int(raw['keep'])
  none = told | {'text_valid': np.zeros_like(told['text_valid'])}
  answer, _ = operate(FlashVLM(), x, none, num_slots=keep)
  by_attention, _ = operate(FlashVLM(eta=0.0), x, told, num_slots=keep)
  np.testing.assert_array_equal(answer.src, by_attention.src)


def test_quantiles_of_rows():
  scores = np.random.default_rng(0).normal(size=(3, 11)).astype(np.float32)
  among = np.arange(11) < np.array([[11], [6], [1]])
  for share in (0.0, 0.3, 0.995, 1.0):
    found = np.asarray(quantile(scores, among, share))[:, 0]
    wanted = [np.quantile(row[here], share) for row, here in zip(scores, among, strict=True)]
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_local_outliers():
  """Against the definition, every pair of values compared, in rows of several lengths."""
  values = np.random.default_rng(1).normal(size=(3, 40)).astype(np.float32) ** 3
  lengths, neighbours = (40, 17, 4), 5
  among = np.arange(40) < np.array(lengths)[:, None]
  found = np.asarray(jax.jit(lambda v, a: local_outliers(v, a, neighbours=neighbours))(
      values, among))
  for row, length in enumerate(lengths):
    distance = np.abs(np.subtract.outer(values[row, :length], values[row, :length]))
    size = min(neighbours, length - 1)
    nearest = np.argsort(distance + np.diag(np.full(length, np.inf)), axis=1)[:, :size]
    far = np.take_along_axis(distance, nearest, axis=1).max(axis=1)
    reach = np.maximum(np.take_along_axis(distance, nearest, axis=1), far[nearest])
    density = 1 / (reach.mean(axis=1) + 1e-10)
    factor = density[nearest].mean(axis=1) / density
    np.testing.assert_array_equal(found[row, :length], factor > 1.5)
    assert not found[row, length:].any()
  assert found[0].sum() > 2


class GivenRelevance(Recoverable):
  """Takes what a recording has in place of the prompt."""

  def relevance(self, tokens, signals):
    return jnp.pad(signals.text[:, 0], ((0, 0), (1, 0)))


def recoverable(method, raw, *, keep=64):
  batch, slots, _ = raw['hidden_states'].shape
  told = {name: raw[f'{short}_proj_out'].reshape(batch, slots, 4, -1)
          for name, short in (('queries', 'q'), ('keys', 'k'))}
  return operate(method, raw['hidden_states'], told | {'text': raw['text_similarity']},
                 protected=1, num_slots=keep)


@pytest.mark.parametrize('case', [0, 1])
def test_recoverable(case):
  raw = load(f'recoverable_case{case}')
  answer, reduced = recoverable(GivenRelevance(), raw)
  count = raw['out_tokens'].shape[1]
  assert answer.wanted.tolist() == [1 + count]
  np.testing.assert_array_equal(reduced.valid[0], np.arange(64) < 1 + count)
  close(reduced.x[:, 1:1 + count], raw['out_tokens'])


@pytest.mark.long
def test_recoverable_takes_the_first_where_there_is_room_for_few():
  raw = load('recoverable_case0')
  outliers = jax.jit(lambda a: local_outliers(a, jnp.ones(a.shape, bool), neighbours=20))(
      raw['cls_attn'])
  assert np.mean(outliers) == raw['lof_ratio_vision_k20']
  few, reduced = recoverable(GivenRelevance(variant='paper'), raw, keep=6)
  most = np.sort(np.argsort(-raw['cls_attn'][0])[:4])
  np.testing.assert_array_equal(few.src[0, 1:5] - 1, most)
  assert few.wanted > 6
  # The others add up to the last.
  rest = np.setdiff1d(np.arange(576), most)
  close(reduced.x[0, 5], raw['cls_attn'][0, rest] @ raw['hidden_states'][0, 1 + rest])


def test_recoverable_compares_each_tokens_own_keys():
  """The variant of the paper: as many as outliers, and keys of the tokens that are compared."""
  raw = load('recoverable_case1')
  answer, _ = recoverable(GivenRelevance(variant='paper'), raw)
  main = int(raw['main'])
  weights, src = np.asarray(answer.weights)[0, :, 1:], np.asarray(answer.src)[0] - 1
  centres = np.flatnonzero((weights > 0).sum(axis=1) == 33)
  # Nine lie apart below the others, of which the prompt makes two main ones.
  assert len(centres) == 7
  keys = raw['k_proj_out'][0, 1:]
  keys = keys / np.linalg.norm(keys, axis=1, keepdims=True)
  for row in centres:
    alike = keys @ keys[src[row]] + 50 * raw['text_similarity'][0, 0]
    alike = np.where(np.isin(np.arange(len(keys)), [src[row], *src[1:1 + main]]), -np.inf, alike)
    near = np.sort(np.argsort(-alike)[:32])
    np.testing.assert_array_equal(np.setdiff1d(np.flatnonzero(weights[row]), src[row]), near)


def test_gprune():
  """A thumbnail, and what stands behind it."""
  raw = load('gprune_case0')
  for part, start, stop in ((1, 0, 576), (2, 576, 624)):
    x, score = raw['features'][None, start:stop], raw[f'score{part}']
    kept = raw[f'kept_sorted{part}'] - start
    found = jax.jit(lambda x: GPrune().reached(x, jnp.ones(x.shape[:2], bool)))(x)
    np.testing.assert_allclose(found[0], score, rtol=1e-5)
    answer, _ = operate(GPrune(), x, {}, num_slots=len(kept))
    np.testing.assert_array_equal(answer.src[0], kept)


def trimmed(raw, variant, keep, **text):
  """The release's features: [CLS] in front, whose attention the recording has as all others'."""
  x = np.pad(raw['features'], ((0, 0), (1, 0), (0, 0)))
  logits = np.einsum('bhd,bnhd->bhn', raw['queries'][:, 0], raw['keys']) / 2
  told = {'cls_attention': np.asarray(jax.nn.softmax(logits, axis=2)), 'queries': raw['queries'],
          'keys': raw['keys'], 'vision_features': x, **prompt(raw['text'][0]), **text}
  return operate(VisionTrim(variant=variant, complement=int(raw['complement'])), x, told,
                 num_slots=1 + keep, protected=1, grid=(8, 8),
                 pos=np.arange(-1, 64, dtype=np.int32)[None])


def test_visiontrim():
  raw = load('visiontrim_case0')
  keep = int(raw['dominant'])
  _, reduced = trimmed(raw, 'release', keep)
  np.testing.assert_array_equal(reduced.x[:, 1:], raw['out_release'])
  _, reduced = trimmed(raw, 'paper', keep + int(raw['complement']))
  assert reduced.valid.all()
  close(reduced.x[:, 1:], raw['out_paper'])


def test_importance_of_visiontrim():
  raw = load('visiontrim_case0')
  logits = np.einsum('bhd,bnhd->bhn', raw['queries'][:, 0], raw['keys']) / 2
  attended = jax.nn.softmax(logits, axis=2).mean(axis=1)[:, 1:]

  @jax.jit
  def measure(x, attended):
    tokens = TokenSet.create(x)
    near = local_importance(tokens, x, (8, 8))
    return near, by_each_others_variance(attended, near, tokens.free)

  near, importance = measure(raw['features'], attended)
  np.testing.assert_allclose(near, raw['local_importance'], rtol=1e-5)
  np.testing.assert_allclose(importance, raw['importance'], rtol=1e-5)


def test_visiontrim_of_a_row_without_words_merges_by_likeness():
  raw = load('visiontrim_case0')
  none = {'text_valid': np.zeros(raw['text'].shape[:2], bool)}
  answer, _ = trimmed(raw, 'paper', 17, **none)
  by_rank = np.argsort(-raw['importance'][0])
  np.testing.assert_array_equal(answer.src[0, 1:13] - 1, np.sort(by_rank[:12]))
  np.testing.assert_array_equal(answer.src[0, 13:] - 1, np.sort(by_rank[12:17]))
  # Itself, and a mean in each of three rounds in which any joins.
  weights = np.asarray(answer.weights)[0, 13:].sum(axis=1)
  np.testing.assert_allclose(weights, np.round(weights), atol=1e-5)
  assert weights.max().round() == 4
