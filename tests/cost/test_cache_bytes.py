"""Budgets in bytes of the cache, over all plans of a config together."""

import pytest

from lib.cost.vlm import kv_bytes_of
from models.backbones.lm import LM
from models.plan import make_plan
from models.reduce_config import with_plans
from ops.rope import Rope

SLOTS = 200
LANGUAGE_MODEL = LM(vocabulary=64, width=32, depth=4, mlp=64, heads=4, kv_heads=2, head_width=16,
                    context=256, rope=Rope(16))
# Keys and values of a slot in all layers, float32.
SLOT = 4 * 2 * 2 * 16 * 4
SNAPKV = {'method': 'snapkv', 'args': {'window': 4}}
FASTV = {'method': 'fastv', 'layers': 2, 'token_kinds': 'text'}


def made(**reduce):
  return with_plans(LANGUAGE_MODEL, **reduce, kv_bytes=kv_bytes_of)(SLOTS)


def held(model):
  return kv_bytes_of(model, SLOTS, None) / 1e6


WHOLE = SLOT * SLOTS / 1e6


@pytest.mark.parametrize('share', [1.0, 0.61, 0.25, 0.1])
@pytest.mark.parametrize('cache', [SNAPKV, {'method': 'pyramidkv', 'args': {'inner': SNAPKV}},
                                   {'method': 'streaming_llm', 'layers': (1, 3)}])
def test_the_cache_holds_no_more_and_hardly_less(cache, share):
  if 'layers' in cache:
    share = (1 + share) / 2  # Of half of the layers.
  model = made(cache={**cache, 'kv_mb': share * WHOLE})
  # A thousandth of the tokens, and the entry that each layer rounds away.
  assert share * WHOLE - 0.002 * WHOLE - SLOT / 1e6 <= held(model) <= share * WHOLE
  same = with_plans(LANGUAGE_MODEL, cache={**cache, 'keep': SLOTS}, kv_bytes=kv_bytes_of)(SLOTS)
  assert held(same) == pytest.approx(WHOLE, rel=0.01)


def test_what_is_cut_in_the_model_counts_too():
  """A cut before layer 2 halves what two of four layers hold; the cache leaves the rest."""
  budget = 0.5 * WHOLE
  both = made(language={**FASTV, 'keep_ratio': 0.5}, cache={**SNAPKV, 'kv_mb': budget})
  alone = made(cache={**SNAPKV, 'kv_mb': budget})
  assert 0.97 * budget < held(both) <= budget
  kept = [[event.slots_out for event in model.cache_plan.events] for model in (both, alone)]
  assert kept[0][0] > kept[1][0]
  # Or the cut is what gives, beside a cache with a budget of its own.
  cut = made(language={**FASTV, 'kv_mb': 0.7 * WHOLE}, cache={**SNAPKV, 'keep_ratio': 0.9})
  assert 0.97 * 0.7 * WHOLE < held(cut) <= 0.7 * WHOLE
  event, = cut.plan.events
  assert event.slots_in == SLOTS > event.slots_out


@pytest.mark.parametrize(('reduce', 'said'), [
    ({'language': {**FASTV, 'kv_mb': 0.4 * WHOLE}},
     'with as little as fastv can leave here, the cache of this prompt holds 0.103 of 0.205 MB'),
    ({'cache': {**SNAPKV, 'kv_mb': 1e-6}}, 'with as little as snapkv can leave here'),
    ({'cache': {**SNAPKV, 'kv_mb': 1.0, 'keep': 9}}, 'exactly one budget, got kv_mb and keep'),
    ({'cache': {**SNAPKV, 'kv_mb': 0}}, 'kv_mb=0 must be above 0'),
    ({'cache': {**SNAPKV, 'kv_mb': '1'}}, 'kv_mb'),
    ({'language': {**FASTV, 'kv_mb': 1.0}, 'cache': {**SNAPKV, 'kv_mb': 1.0}},
     'fastv and snapkv both have kv_mb')])
def test_budgets_that_cannot_be_are_one_line(reduce, said):
  with pytest.raises(ValueError, match=r'.') as caught:
    made(**reduce)
  assert said in str(caught.value)
  assert '\n' not in str(caught.value)


def test_a_cost_model_is_needed_and_a_cache():
  with pytest.raises(ValueError, match='needs a cost model to solve for'):
    with_plans(LANGUAGE_MODEL, cache={**SNAPKV, 'kv_mb': 1.0})(SLOTS)
  with pytest.raises(ValueError, match="no key 'kv_mb'"):
    make_plan({**FASTV, 'kv_mb': 1.0}, LANGUAGE_MODEL.host(SLOTS))
