"""Budgets to counts: every form, its errors, exact rounding, and targets in FLOPs."""

import itertools
import math
import types
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ops.budgets import Cut, Limits, constant_or_inflected, parse_layers, resolve

LIMITS = Limits(depth=12, slots=197, protected=1)


def counts(budget, limits=LIMITS, macs=None):
  return [(cut.layer, cut.slots_in, cut.slots_out) for cut in resolve(budget, limits, macs=macs)]


def half(slots, protected=1):
  """As for a method that can remove half of the free tokens at once."""
  return slots - (slots - protected) // 2


# remove


def test_remove_the_same_everywhere_and_stop_where_the_method_must():
  assert counts({'remove': 13, 'layers': (0, 3)}) == [(0, 197, 184), (3, 184, 171)]
  limits = Limits(depth=4, slots=21, protected=1, min_slots=half)
  assert counts({'remove': 8}, limits) == [(0, 21, 13), (1, 13, 7), (2, 7, 4), (3, 4, 3)]
  assert counts({'remove': 50}, Limits(depth=3, slots=10, protected=1)) == [(0, 10, 1)]
  assert counts({'remove': 0}) == []
  assert counts({'remove': 5}, Limits(depth=3, slots=10, min_slots=lambda slots: slots)) == []


def test_remove_rising_and_falling():
  assert [a - b for _, a, b in counts({'remove': (3, -1.0), 'layers': (0, 4, 8)})] == [6, 3]
  assert [a - b for _, a, b in counts({'remove': (3, 1.0), 'layers': (0, 4, 8)})] == [3, 6]
  assert constant_or_inflected((8, -1.0), 4) == (16, 10, 5, 0)
  assert constant_or_inflected([7, 0.0], 3) == (7, 7, 7)
  assert constant_or_inflected((5, 0.5), 1) == (2,)
  # 10 * (1 - 9/10) is 1; in floats it is 0.99…, and int() makes it 0.
  assert constant_or_inflected((10, 0.9), 2) == (1, 19)


@pytest.mark.long
@given(rate=st.integers(0, 60), eighths=st.integers(-8, 8), depth=st.integers(1, 40))
def test_inflected_removal_is_a_truncated_line(rate, eighths, depth):
  removed = constant_or_inflected((rate, eighths / 8), depth)
  low = math.floor(Fraction(rate * (8 - eighths), 8))
  assert len(removed) == depth
  assert removed[0] == low
  if depth > 1:
    assert removed[-1] == 2 * rate - low
    steps = [b - a for a, b in itertools.pairwise(removed)]
    assert max(steps) - min(steps) <= 1
    assert rate * depth - depth <= sum(removed) <= rate * depth


# keep_ratio


@pytest.mark.parametrize(('rounding', 'exact'), [
    ('ceil', math.ceil), ('floor', math.floor), ('round', round)])
@pytest.mark.parametrize('ratio', [0.9, 0.7, 0.55, 0.29, 1 / 3])
def test_ratios_are_exact_fractions_at_every_count(ratio, rounding, exact):
  fraction = Fraction(repr(ratio))
  for free in range(2, 1001):
    left = exact(fraction * free)
    if not 0 < left < free:
      continue
    found, = counts({'keep_ratio': ratio, 'layers': 0, 'rounding': rounding},
                    Limits(depth=1, slots=free + 1, protected=1))
    assert found == (0, free + 1, left + 1)


def test_ratios_of_what_is_there_or_of_the_start():
  three = {'layers': (3, 6, 9), 'keep_ratio': 0.7}
  assert counts(three) == [(3, 197, 139), (6, 139, 98), (9, 98, 69)]
  assert counts({**three, 'rounding': 'floor', 'ratio_of': 'start'}) == [
      (3, 197, 138), (6, 138, 97), (9, 97, 68)]
  assert counts({**three, 'keep_ratio': [0.7, 0.7, 0.5]}) == [
      (3, 197, 139), (6, 139, 98), (9, 98, 50)]
  assert counts({**three, 'keep_ratio': (0.7, 0.7, 0.5), 'ratio_of': 'start'}) == [
      (3, 197, 139), (9, 139, 99)]
  assert counts({**three, 'keep_ratio': 1}) == []
  none = {**three, 'rounding': None, 'ratio_of': None}
  assert counts(none) == counts(three)


def test_slots_that_a_method_adds_come_on_top():
  fused = Limits(depth=12, slots=197, protected=1, extra=1)
  assert counts({'layers': (3, 6, 9), 'keep_ratio': 0.7}, fused) == [
      (3, 197, 140), (6, 140, 100), (9, 100, 72)]
  # Keeping all but one and adding one changes nothing.
  assert counts({'layers': 3, 'keep_ratio': 0.9}, Limits(4, 6, 1, 1)) == []


# keep


def test_counts():
  assert counts({'keep': (48, 32, 16), 'layers': (2, 4, 6)}) == [
      (2, 197, 49), (4, 49, 33), (6, 33, 17)]
  assert counts({'keep': 48, 'layers': (2, 4)}) == [(2, 197, 49)]
  assert counts({'keep': 48, 'layers': 2}, Limits(12, 197, 1, 1)) == [(2, 197, 50)]
  assert counts({'keep': 196, 'layers': 2}) == []


# flops_ratio, gmacs


def model(depth, width=64, protected=1, slots=197):
  """MACs of a plain transformer: attention at the tokens before a cut, the MLP after it."""

  def macs(cuts):
    there, total = slots, 0
    for layer in range(depth):
      total += 4 * there * width**2 + 2 * there**2 * width
      there = next((cut.slots_out for cut in cuts if cut.layer == layer), there)
      total += 8 * there * width**2
    return total

  return macs


def evenly(total, limits):
  """`total` tokens over all layers: after i of L layers floor(total i / L), where that can be."""
  cuts, slots = [], limits.slots
  for layer in range(limits.depth):
    count = total * (layer + 1) // limits.depth - total * layer // limits.depth
    keep = max(slots - count, limits.min_slots(slots))
    cuts, slots = cuts + [Cut(layer, slots, keep)] * (keep < slots), keep
  return tuple(cuts)


@pytest.mark.long
@given(percent=st.integers(20, 110))
def test_even_removal_meets_a_target_and_no_gentler_one_does(percent):
  limits, macs = Limits(12, 197, 1, min_slots=half), model(12)
  cuts = resolve({'flops_ratio': percent / 100}, limits, macs=macs)
  target = percent / 100 * macs(())
  total = next(total for total in range(12 * 197) if macs(evenly(total, limits)) <= target)
  assert cuts == evenly(total, limits)


@pytest.mark.long
@given(percent=st.integers(50, 110))
def test_one_ratio_in_some_layers_meets_a_target(percent):
  layers, macs = (3, 6, 9), model(12)
  cuts = resolve({'flops_ratio': percent / 100, 'layers': layers}, LIMITS, macs=macs)
  target = percent / 100 * macs(())
  assert macs(cuts) <= target
  by_ratio = [resolve({'keep_ratio': step / 1000, 'layers': layers}, LIMITS)
              for step in range(1, 1001)]
  assert cuts in by_ratio
  assert all(macs(cuts) >= macs(other) for other in by_ratio if macs(other) <= target)


def test_targets_in_gmacs():
  macs = model(12, width=384)
  assert resolve({'gmacs': 2.7}, LIMITS, macs=macs) == resolve(
      {'flops_ratio': 2.7e9 / macs(())}, LIMITS, macs=macs)
  assert resolve({'gmacs': 1000}, LIMITS, macs=macs) == ()


def test_a_target_is_met_where_the_method_limits_each_cut():
  limits, macs = Limits(12, 197, 1, min_slots=lambda slots: slots - (slots - 1) // 4), model(12)
  cuts = resolve({'flops_ratio': 0.6, 'layers': (2, 4, 6, 8)}, limits, macs=macs)
  assert macs(cuts) <= 0.6 * macs(())
  assert all(cut.slots_out >= limits.min_slots(cut.slots_in) for cut in cuts)


# layers


def test_layers():
  assert parse_layers('all', 3) == (0, 1, 2)
  assert parse_layers(None, 3) == (0, 1, 2)
  assert parse_layers(2, 3) == (2,)
  assert parse_layers([2, 0], 3) == (0, 2)
  assert parse_layers(range(1, 3), 3) == (1, 2)


# errors


@pytest.mark.parametrize(('budget', 'message'), [
    ({}, 'exactly one budget, got none: choose one of remove, keep_ratio, keep, flops_ratio, '
         'gmacs'),
    ({'remove': 1, 'keep': 2}, "exactly one budget, got ['remove', 'keep']"),
    ({'remove': -1}, 'remove=-1 must be a count from 0 or (count, inflection in [-1, 1])'),
    ({'remove': 1.5}, 'remove=1.5 must be'),
    ({'remove': '13'}, "remove='13' must be"),
    ({'remove': (13,)}, 'remove=(13,) must be'),
    ({'remove': (13, 2.0)}, 'remove=(13, 2.0) must be'),
    ({'remove': (-3, 0.5)}, 'remove=(-3, 0.5) must be'),
    ({'keep_ratio': 0.0}, 'keep_ratio=0.0 leaves no token in layer 0, but this method must leave '
                          'one at least: raise the budget'),
    ({'keep_ratio': 70}, 'keep_ratio=70 is outside [0, 1]: it is the share of tokens that stays'),
    ({'keep_ratio': math.nan}, 'keep_ratio=nan is outside [0, 1]'),
    ({'keep_ratio': (0.5, 'a', 0.5), 'layers': (1, 2, 3)}, "keep_ratio='a' is outside [0, 1]"),
    ({'keep_ratio': (0.5, 0.5)}, 'keep_ratio=(0.5, 0.5) has 2 values for 12 layers'),
    ({'keep_ratio': 0.5, 'rounding': 'up'}, "rounding='up' is unknown: choose one of ceil, floor"),
    ({'keep_ratio': 0.5, 'ratio_of': 'end'}, "ratio_of='end' is unknown: choose one of current"),
    ({'keep_ratio': 0.001, 'rounding': 'floor', 'layers': 1},
     'keep_ratio=0.001 leaves 1 of 197 slots in layer 1, but this method can leave no fewer than 2 '
     '(1 protected): raise the budget or cut in more layers'),
    ({'keep': 0, 'layers': 1}, 'keep=0 leaves no token in layer 1, but this method must leave one'),
    ({'keep': -1, 'layers': 1}, 'keep=-1 in layer 1 is impossible: 196 tokens are there to keep'),
    ({'keep': 197, 'layers': 1}, 'keep=197 in layer 1 is impossible'),
    ({'keep': 2.5, 'layers': 1}, 'keep=2.5 in layer 1 is impossible'),
    ({'keep': (48, 64), 'layers': (1, 2)}, 'keep=64 in layer 2 is impossible: 48 tokens'),
    ({'keep': (48, 32)}, 'keep=(48, 32) has 2 values for 12 layers'),
    ({'flops_ratio': 0}, 'flops_ratio=0 must be a positive number'),
    ({'gmacs': -1.0}, 'gmacs=-1.0 must be a positive number'),
    ({'gmacs': '2.9'}, "gmacs='2.9' must be a positive number"),
    ({'flops_ratio': math.nan}, 'flops_ratio=nan must be a positive number'),
    ({'gmacs': 2.9}, 'gmacs=2.9 needs a cost model to solve for: none was given'),
    ({'remove': 1, 'layers': 12}, 'layer 12 is out of range: the model has layers 0 to 11'),
    ({'remove': 1, 'layers': (3, -1)}, 'layer -1 is out of range'),
    ({'remove': 1, 'layers': (1.5,)}, 'layer 1.5 is out of range'),
    ({'remove': 1, 'layers': 1.5}, 'layer 1.5 is out of range'),
    ({'remove': 1, 'layers': 'last'}, "layers='last' is unknown: give 'all', a layer index or"),
    ({'remove': 1, 'layers': ()}, 'layers=() must name at least one layer, each once'),
    ({'remove': 1, 'layers': (2, 2)}, 'layers=(2, 2) must name at least one layer, each once'),
], ids=str)
def test_errors_name_the_value_and_the_way_out(budget, message):
  with pytest.raises(ValueError) as caught:  # noqa: PT011
    resolve(types.MappingProxyType(budget), LIMITS)
  assert message in str(caught.value)
  assert '\n' not in str(caught.value)


def test_errors_where_a_method_cannot_cut_so_deep():
  limits = Limits(4, 21, 1, min_slots=half)
  with pytest.raises(ValueError, match=r'keep_ratio=0\.25 leaves 6 of 21 slots in layer 1, but '
                                       r'this method can leave no fewer than 11 \(1 protected\)'):
    resolve({'keep_ratio': 0.25, 'layers': 1}, limits)
  with pytest.raises(ValueError, match=r'flops_ratio=0\.05 cannot be met: cutting all that this '
                                       r'method can cut leaves 0\.\d+ of 0\.\d+ GMACs; raise'):
    resolve({'flops_ratio': 0.05}, Limits(12, 197, 1, min_slots=half), macs=model(12))
  with pytest.raises(ValueError, match='cannot be met'):
    resolve({'flops_ratio': 0.5, 'layers': (10, 11)}, LIMITS, macs=model(12))
