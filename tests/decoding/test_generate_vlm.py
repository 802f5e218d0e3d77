"""Decoding with images: what the Generator answers, against whole forward passes without a cache.

The checkpoints are those of tests/models/test_parity_vlm.py, and so are the prompts: a row with an
image, one of text alone, one with two images.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import mostly_long
from helpers import parity_vlm as parity

from lib.data.pictures import batch_pictures
from models.decoding.generator import Generator
from models.decoding.sampling import Sampling, padded
from models.plans.events import Plan, make_events
from models.reduce_config import with_plans, with_projector_reduction
from models.reduction import Reduction
from ops.assignments import Gather
from ops.budgets import Cut
from ops.moves.rows import take
from ops.reducers.base import Reducer
from ops.splice import next_positions
from ops.tokens import TEXT, VISUAL, TokenSet

NEW = 5
SLOTS = 24
LANGUAGE = {
    'fastv': {'method': 'fastv', 'token_kinds': 'visual', 'layers': 1, 'keep_ratio': 0.4},
    'pyramiddrop': {'method': 'pyramiddrop', 'token_kinds': 'visual', 'layers': (0, 1),
                    'keep_ratio': (0.6, 0.3), 'ratio_of': 'start', 'rounding': 'floor'},
}


@functools.cache
def model(family):
  vlm, params = parity.model(family)
  return vlm.clone(tower=vlm.tower.clone(capture=False), lm=vlm.lm.clone(capture=False)), params


@functools.cache
def given(family):
  """Prompts of three rows, and the batch of their images."""
  ids, valid, images = parity.inputs(family, 'three')
  return [row[real].tolist() for row, real in zip(ids, valid, strict=True)], images


def row_alone(family, row):
  """One of them with its own images."""
  first = sum(parity.BATCHES['three'][:row])
  number = parity.BATCHES['three'][row]
  pictures = parity.pictures(family, parity.expected(family, 'three'))[first:first + number]
  patches = parity.GRID[0] * parity.GRID[1] // 4 if 'qwen' in family else 16
  # Of the same shapes, which the third row needs: one program.
  crops, count, tokens = given(family)[1].layout
  return [given(family)[0][row]], batch_pictures([pictures], patches=patches, crops=crops,
                                                 images=count, tokens=tokens)


def generator(family, **settings):
  reduce = {place: settings.pop(place) for place in ('vision', 'projector', 'language', 'cache')
            if place in settings}
  vlm, params = model(family)
  return Generator(vlm, params, buckets=(SLOTS,), plans=with_plans(vlm, **reduce), **settings)


@functools.cache
def shared(family):
  return generator(family)


def whole_forward(lm, params, tokens, steps):
  """Greedy answers of an LM to a prompt of embeddings, the whole model run anew for every token."""
  batch, slots = tokens.pos.shape[:2]
  after = next_positions(tokens)
  later = after[:, None] + jnp.arange(steps).reshape((1, steps) + (1,) * (after.ndim - 1))

  table = jnp.asarray(params['table'])

  def longer(values, more):
    return jnp.concatenate([values, jnp.asarray(more, values.dtype)], axis=1)

  def run(answer):
    x = longer(tokens.x, table[answer])
    stats = {name: longer(value, jnp.ones((batch, steps)))
             for name, value in tokens.stats.items() if name == 'stays'}
    sequence = TokenSet.create(
        x, pos=longer(tokens.pos, later), kind=longer(tokens.kind, jnp.full((batch, steps), TEXT)),
        valid=longer(tokens.real, jnp.ones((batch, steps), bool)), stats=stats)
    return lm.apply({'params': params}, sequence)[0]

  place = tokens.pos if tokens.pos.ndim == 2 else tokens.pos[..., 0]
  last = jnp.argmax(jnp.where(tokens.real, place, -1), axis=1)
  answer, run = np.zeros((batch, steps), np.int32), jax.jit(run)
  for step in range(steps):
    # What stands behind is not seen: one program for all steps.
    where = last if step == 0 else np.full(batch, slots + step - 1)
    answer[:, step] = run(answer)[np.arange(batch), where].argmax(axis=-1)
  return answer.tolist()


def sequence(vlm, params, prompts, images):
  ids, valid = padded(prompts, SLOTS)
  see = jax.jit(functools.partial(vlm.apply, method='sequence'))
  return see({'params': params}, ids, valid, images)[0]


@functools.cache
def plain(family):
  """Answers without reduction."""
  vlm, params = model(family)
  return whole_forward(vlm.lm, params['lm'], sequence(vlm, params, *given(family)), NEW)


@pytest.mark.long
def test_greedy_answers_are_those_of_whole_forward_passes():
  assert shared('llava')(*given('llava'), new_tokens=NEW) == plain('llava')


@pytest.mark.parametrize(('family', 'side'), mostly_long([
    ('llava', 'left'), ('llava_next', 'right'), ('qwen2_5_vl', 'left')]))
def test_greedy_answers_are_those_of_the_reference(family, side):
  made = shared(family) if side == 'left' else generator(family, side=side)
  found = np.asarray(made(*given(family), new_tokens=NEW))
  wanted = parity.expected(family, 'three')['generated']
  np.testing.assert_array_equal(found[:, :wanted.shape[1]], wanted)


@pytest.mark.long
def test_rows_answer_as_alone_whatever_images_they_have():
  family, warm = 'qwen2_5_vl', Sampling(temperature=1.0)
  together = shared(family)(*given(family), new_tokens=NEW, sampling=warm, seeds=(4, 5, 6))
  for row, seed in ((0, 4), (2, 6)):
    alone = shared(family)(*row_alone(family, row), new_tokens=NEW, sampling=warm, seeds=(seed,))
    assert alone == [together[row]]
  assert len({tuple(answer) for answer in together}) == 3


SHARE = {'token_kinds': 'visual', 'layers': 1, 'keep_ratio': 0.5}
IN_LANGUAGE = {
    'sparsevlm': {'method': 'sparsevlm', **SHARE, 'layers': 0},
    'catp': [{'method': 'catp_images', **SHARE, 'layers': 0},
             {'method': 'catp', **SHARE, 'args': {'part': 'query'}}],
    'pact': {'method': 'pact', **SHARE, 'args': {'cutoff': 0.5}},
}


@pytest.mark.long
@pytest.mark.parametrize('name', IN_LANGUAGE)
def test_rows_answer_as_alone_under_cuts_in_the_language_model(name):
  """A row of two images, beside one of none and one of one; tokens of its own budget."""
  made = generator('llava', language=IN_LANGUAGE[name])
  together = made(*given('llava'), new_tokens=NEW)
  for row in (0, 2):
    assert made(*row_alone('llava', row), new_tokens=NEW) == [together[row]]
  assert together[1] == plain('llava')[1]


@dataclasses.dataclass(frozen=True)
class Told(Reducer):
  """Keeps the tokens that it is told to keep: by others' decisions, where those lie behind."""

  layers: tuple[int, ...] = ()
  positions: str = 'keep'
  needs = frozenset({'layer'})

  def __call__(self, tokens, signals, *, num_slots):
    stays = tokens.fixed | (tokens.stats['stays'] > self.layers.index(signals.layer))
    order = jnp.argsort(~stays, axis=1, stable=True)[:, :num_slots].astype(jnp.int32)
    return Gather(order, tokens.slots, valid=take(stays, order))


@pytest.mark.long
@pytest.mark.parametrize('method', mostly_long(LANGUAGE))
def test_cuts_in_the_language_model_answer_as_hiding_the_same_tokens(method):
  vlm, params = model('llava')
  found = generator('llava', language=LANGUAGE[method])(*given('llava'), new_tokens=NEW)
  prompts, images = given('llava')
  ids, valid = padded(prompts, SLOTS)
  reduced = with_plans(vlm, language=LANGUAGE[method])(SLOTS, images.layout)
  plan = reduced.lm.plan
  _, out = jax.jit(reduced.apply)({'params': params}, ids, valid, images)
  # How many cuts each token of the prompt lives through.
  tokens = out['sequence']
  stays = sum((np.asarray(out['cuts'][cut.layer].owner) >= 0).astype(np.float32)
              for cut in plan.events)
  visual = np.asarray(tokens.valid & (tokens.kind == VISUAL))
  assert (visual & (stays < len(plan.events))).sum(axis=1).tolist()[1:2] == [0]
  assert 0 < (visual & (stays < len(plan.events))).sum() < visual.sum()
  layers = tuple(cut.layer for cut in plan.events)
  told = Reduction('told', Told(layers), mode='mask', of=(VISUAL,), positions=plan.positions)
  cuts = [Cut(cut.layer, tokens.slots + NEW, tokens.slots + NEW - (tokens.slots - cut.slots_out))
          for cut in plan.events]
  hiding = Plan(make_events(told, 'before', cuts, protected=plan.events[0].protected + NEW),
                (told,))
  told = tokens.replace(stats={'stays': jnp.asarray(stays)})
  assert whole_forward(vlm.lm.clone(plan=hiding), params['lm'], told, NEW) == found
  assert found != plain('llava')
  assert found[1] == plain('llava')[1]


@pytest.mark.long
def test_a_cut_at_the_door_answers_as_a_prompt_of_what_is_left():
  vlm, params = model('llava')
  prompts, images = given('llava')
  projector = {'method': 'topk', 'args': {'by': 'cls_attention'}, 'keep': 5}
  found = generator('llava', projector=projector)(prompts, images, new_tokens=NEW)
  left = sequence(with_projector_reduction(vlm, projector, slots=16), params, prompts, images)
  tokens = sequence(vlm, params, prompts, images)
  # Which of the unreduced tokens those are, by their features.
  same = (np.abs(np.asarray(tokens.x)[:, :, None] - np.asarray(left.x)[:, None]).max(axis=-1) < 1e-6
          ) & np.asarray(tokens.valid)[:, :, None] & np.asarray(left.valid)[:, None]
  stays = same.any(axis=2)
  assert stays.sum(axis=1).tolist() == left.valid.sum(axis=1).tolist()
  place = np.maximum(stays.cumsum(axis=1) - 1, 0)
  masked = TokenSet.create(tokens.x, pos=jnp.asarray(place, jnp.int32), kind=tokens.kind,
                           valid=jnp.asarray(stays))
  assert whole_forward(vlm.lm, params['lm'], masked, NEW) == found
  assert found != plain('llava')


@pytest.mark.parametrize(('family', 'reduce', 'visual'), mostly_long([
    # An image may take all crops of its row: eight patches of each of two.
    ('llava', {'vision': {'method': 'tome', 'layers': (0, 1), 'remove': 4}}, 2 * 16),
    ('llava', {'projector': {'method': 'stride', 'keep': 3}, 'language': {
        'method': 'none', 'layers': 'all', 'keep': None}}, 2 * 3),
    ('llava_next', {'projector': {'method': 'stride', 'keep_ratio': 0.25},
                    'language': LANGUAGE['fastv']}, None),
    ('qwen2_5_vl', {'projector': {'method': 'divprune', 'keep': 6, 'across': 'prompt'},
                    'language': LANGUAGE['fastv']}, 6),
    ('llava', {'cache': {'method': 'snapkv', 'keep': 20, 'args': {'window': 4}},
               'language': LANGUAGE['fastv']}, 2 * 16),
]), ids=['tower', 'projector', 'crops', 'prompt', 'cache'])
def test_plans_fit_the_slots_that_images_take(family, reduce, visual):
  vlm, params = model(family)
  prompts, images = given(family)
  plans = with_plans(vlm, **reduce)
  visual = visual or 2 * -(-images.index.shape[2] // 4)
  assert plans.visual_slots(images.layout) == visual
  assert plans(SLOTS, images.layout) is plans(SLOTS, images.layout)
  ids, valid = padded(prompts, SLOTS)

  def prefill(images):
    reduced = plans(SLOTS, None if images is None else images.layout)
    run = functools.partial(reduced.apply, room=NEW, method='prefill')
    _, cache = jax.eval_shape(run, {'params': params}, ids, valid, images)
    return [layer.filled for layer in cache.layers]

  if 'cache' in reduce:
    assert prefill(images) == [20, 20]
    assert prefill(None) == [20, 20]
    return
  # A cut before layer 1 keeps the nearest above 0.4 of them.
  left = -(-2 * visual // 5) if reduce.get('language') == LANGUAGE['fastv'] else visual
  assert prefill(images) == [SLOTS + visual, SLOTS + left]
  # Text alone knows of no images.
  assert prefill(None) == [SLOTS, SLOTS]


def test_no_reductions_leave_the_model_as_it_is():
  vlm, _ = model('llava')
  images = given('llava')[1]
  none = {'method': 'none', 'keep': None, 'across': 'image'}
  assert with_plans(vlm, projector=none, language={'method': 'none'})(SLOTS, images.layout) is vlm
  with pytest.raises(ValueError, match=r'reduce\.projector acts on images, and this model reads'):
    with_plans(vlm.lm, projector={'method': 'topk', 'keep': 4})
  assert with_plans(vlm.lm, vision=none)(SLOTS) is vlm.lm


@pytest.mark.long
def test_leaving_midway_breaks_nothing_and_shapes_share_programs():
  made = shared('llava')
  stream = made.stream(*given('llava'), new_tokens=NEW)
  first = [next(stream), next(stream)]
  stream.close()
  for _ in made.stream(*given('llava'), new_tokens=NEW):
    break
  whole = list(made.stream(*given('llava'), new_tokens=NEW))
  np.testing.assert_array_equal(first, whole[:2])
  assert np.stack(whole, axis=1).tolist() == plain('llava')
  # A longer prompt in the same bucket, with images of the same shapes.
  prompts, images = given('llava')
  made([[7, *prompt] for prompt in prompts], images, new_tokens=NEW)
  assert dict(made.compilations) == {
      ('prefill', 3, SLOTS, 16): 1, ('decode', 3, SLOTS + 2 * 16, 16): 1}


@pytest.mark.long
def test_scores_of_what_is_decoded_are_greedy():
  prompts, images = given('llava')
  # A row may end with its image.
  prompts = [*prompts[:2], prompts[2][:max(np.flatnonzero(np.equal(prompts[2], 30))) + 1]]
  answers = shared('llava')(prompts, images, new_tokens=3)
  found = shared('llava').score(prompts, answers, images)
  assert [score.greedy for score in found] == [True] * 3
  forced = generator('llava', cache={'method': 'knorm', 'keep': 99})
  for score, wanted in zip(forced.score(prompts, answers, images), found, strict=True):
    assert score.log_likelihood == pytest.approx(wanted.log_likelihood, abs=1e-4)
    assert score.greedy
  others = [[(token + 1) % 40 for token in answer] for answer in answers]
  assert not any(score.greedy for score in shared('llava').score(prompts, others, images))


def test_the_context_is_for_visual_tokens_as_well():
  vlm, params = model('llava')
  short = vlm.clone(lm=vlm.lm.clone(context=64))
  prompts, images = given('llava')
  made = Generator(short, params, buckets=(SLOTS, 64))
  longest = max(map(len, prompts))
  assert made.slots(longest, 4, visual=32) == (20, 12)
  with pytest.raises(ValueError, match=rf'a prompt of {longest} tokens with 32 visual ones and 30 '
                                       r'new ones are impossible: they may be 64 \(the context\)'):
    made(prompts, images, new_tokens=30)
  # Fewer visual tokens leave room for more of others.
  plans = with_plans(short, projector={'method': 'stride', 'keep': 4})
  assert made.slots(longest, 30, visual=plans.visual_slots(images.layout)) == (24, 32)


@pytest.mark.long
def test_images_and_a_question_may_come_in_chunks():
  """The prompts as one chunk, then one more token, are the prompts and a decoded token."""
  vlm, params = model('qwen2_vl')
  prompts, images = given('qwen2_vl')
  ids, valid = padded(prompts, max(map(len, prompts)), side='left')
  run = functools.partial(vlm.apply, {'params': params})
  logits, cache = run(ids, valid, images, room=2, method='prefill')
  empty = vlm.lm.empty_cache(len(ids), cache.layers[0].filled)
  found, read = run(ids, empty, valid, images, room=2, method='extend')
  np.testing.assert_allclose(found, logits, atol=1e-4)
  token = np.asarray(ids[:, -1:])
  wanted, _ = run(token[:, 0], cache, method='decode')
  for context in (cache, read):
    found, _ = run(token, context, np.ones_like(token, bool), method='extend')
    np.testing.assert_allclose(found, wanted, atol=1e-4)
