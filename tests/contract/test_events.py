"""Several reductions in one tower: each sees what the ones before it left."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from helpers.tiny_lm import TINY

from configs import digits
from lib.tasks.settings import check_config
from models.backbones.vit import ViT
from models.plan import make_plan
from models.reduce_config import with_plans, with_vision_plan
from ops.moves.rows import take
from ops.primitives.select import keep_top
from ops.reducers import REDUCERS
from ops.reducers.base import Reducer

VIT = ViT(width=16, depth=4, mlp=24, heads=2, patch=4, image_size=20, channels=1, num_classes=0,
          capture=True)
IMAGES = np.random.default_rng(0).normal(size=(2, 20, 20, 1)).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Watched(Reducer):
  """Keeps the tokens with the largest keys, and takes down what it was shown."""

  told: list = dataclasses.field(default_factory=list, hash=False, compare=False)
  needs = frozenset({'keys', 'cls_attention'})

  def __call__(self, tokens, signals, *, num_slots):
    self.told.append((tokens, signals))
    return keep_top(tokens, jnp.linalg.norm(signals.keys, axis=(2, 3)), num_slots=num_slots)


@functools.cache
def parameters():
  return jax.jit(VIT.init)(jax.random.key(1), IMAGES)


def run(*configs):
  """The tiny ViT under several reductions: its features, what it tells, and its plan."""
  vit = VIT.clone(plan=make_plan(configs, VIT.host))
  return (*jax.jit(vit.apply)(parameters(), IMAGES), vit.plan)


@pytest.mark.long
@pytest.mark.parametrize('sites', [
    (('between', 1), ('after', 1)), (('between', 1), ('before', 2)), (('inside', 1), ('after', 1)),
    (('after', 1), ('before', 2)), (('between', 1), ('between', 1))])
def test_signals_follow_the_tokens_from_event_to_event(sites, monkeypatch):
  monkeypatch.setitem(REDUCERS, 'watched', Watched)
  (first, one), (second, other) = sites
  configs = ({'method': 'watched', 'site': first, 'layers': one, 'remove': 6},
             {'method': 'watched', 'site': second, 'layers': other, 'remove': 4})

  @jax.jit
  def told(params):
    vit = VIT.clone(plan=make_plan(configs, VIT.host))
    vit.apply(params, IMAGES)
    return [event.method.told[0] for event in vit.plan.events]

  (before, shown), (after, seen) = jax.tree.map(np.asarray, told(parameters()))
  assert (before.slots, after.slots) == (26, 20)
  # A slot of the second event is where the first one's position is.
  index = np.argmax(after.pos[:, :, None] == before.pos[:, None], axis=2)
  np.testing.assert_allclose(seen.keys, take(shown.keys, index), atol=1e-6)
  attention = np.take_along_axis(shown.cls_attention, index[:, None].repeat(2, axis=1), axis=2)
  np.testing.assert_allclose(seen.cls_attention, attention, atol=1e-6)


@pytest.mark.long
def test_several_reductions_equal_one_after_the_other():
  """The second tower starts from what the first left behind its last event."""
  first = {'method': 'topk', 'remove': 6, 'layers': 1}
  second = {'method': 'tome', 'remove': 5, 'layers': 2}
  both, out, plan = run(first, second)
  assert [tokens.left for tokens in plan.profile(4, 26)] == [26, 20, 15, 15]
  begun = VIT.clone(plan=make_plan(first, VIT.host), layers=(0, 2))
  left, _ = jax.jit(begun.apply)(parameters(), IMAGES)
  host = dataclasses.replace(VIT.host, slots=20)
  ended = VIT.clone(plan=make_plan(second, host), layers=(2, 4))
  apart, told = jax.jit(ended.apply)(parameters(), left)
  np.testing.assert_allclose(both, apart, atol=1e-5)
  np.testing.assert_array_equal(out['tokens'].owner, told['tokens'].owner)


@pytest.mark.long
def test_the_order_of_events_is_that_of_layers_and_sites():
  one = {'method': 'topk', 'remove': 6, 'layers': 1, 'site': 'after'}
  other = {'method': 'tome', 'remove': 5, 'layers': 1, 'site': 'between'}
  features, _, plan = run(one, other)
  assert [event.reduction.name for event in plan.events] == ['tome', 'topk']
  swapped, _, _ = run(other, one)
  np.testing.assert_array_equal(features, swapped)


def test_learned_methods_have_parameters_by_layer_and_name():
  configs = [{'method': 'dynamicvit', 'keep': 18, 'layers': 1},
             {'method': 'patchmerger', 'keep': 9, 'layers': 1, 'site': 'after'},
             {'method': 'dynamicvit', 'keep': 6, 'layers': 3}]
  vit = VIT.clone(plan=make_plan(configs, VIT.host))
  stack = jax.eval_shape(vit.init, jax.random.key(0), IMAGES)['params']['stack']
  assert stack.keys() == {'blocks', 'reducer_01_dynamicvit', 'reducer_01_patchmerger',
                          'reducer_03_dynamicvit'}
  one = VIT.clone(plan=make_plan(configs[0], VIT.host))
  stack = jax.eval_shape(one.init, jax.random.key(0), IMAGES)['params']['stack']
  assert stack.keys() == {'blocks', 'reducer_01'}
  with pytest.raises(ValueError, match="both have the parameters 'reducer_01_dynamicvit'"):
    make_plan([configs[0], {**configs[0], 'site': 'after', 'keep': 6}], VIT.host)


def test_configs_take_several_reductions():
  """As a tower and as a language model, from what a run's config.json holds."""
  vision = [{'method': 'topk', 'remove': 6, 'layers': 1}, {'method': 'none'},
            {'method': 'tome', 'remove': 5, 'layers': 2}]
  assert with_vision_plan(VIT, vision).plan == make_plan([vision[0], vision[2]], VIT.host)
  assert with_vision_plan(VIT, vision[:2]).plan == make_plan(vision[0], VIT.host)
  assert with_vision_plan(VIT, [{'method': 'none'}]) == VIT
  language = ({'method': 'random', 'keep': 8, 'layers': 1},
              {'method': 'stride', 'keep': 6, 'layers': 2})
  plans = with_plans(TINY, language=language, cache={'method': 'snapkv', 'keep': 4,
                                                         'args': {'window': 2}})
  assert plans(12).plan.name == 'random+stride'
  assert [event.slots_in for event in plans(12).cache_plan.events] == [12, 12, 8]
  for component in ('projector', 'cache'):
    with pytest.raises(ValueError, match=rf'reduce\.{component} takes one reduction, and these are '
                                         r'2 \(random, stride\): leave one'):
      with_plans(TINY, **{component: language})(12)
  config = digits.get_config()
  with config.ignore_type():
    config.reduce.vision = vision
  stored = ml_collections.ConfigDict(json.loads(config.to_json_best_effort()))
  check_config(stored, 'model', 'reduce')
  assert [dict(each) for each in stored.reduce.vision] == vision
  with pytest.raises(ValueError, match='must be a dict of keys'):
    with_vision_plan(VIT, ['tome'])
