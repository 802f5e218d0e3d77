"""The contract: every method against every invariant. A new method is tested by existing.

An invariant is a function of a method's name. It fails, or returns '' where it holds, or says why
it does not apply, having checked that reason as far as it can. The terminal summary prints all of
it as one table (tests/conftest.py).

Axes: B batch, N slots now, M slots after, T original tokens, D features.
"""

import dataclasses

import jax.numpy as jnp
import pytest
from helpers import contract
from helpers.invariants import INVARIANTS

from ops.assignments import Gather, Merge
from ops.primitives.select import keep_top, top
from ops.reducers import REDUCERS
from ops.reducers.base import Reducer
from ops.reducers.vision.tome import ToMe

# The invariants.


# Every length, and every gradient, is a program of its own: some methods of each kind are enough
# for a short run, and a few more with padding.
LONG = ('budgets', 'finite', 'compose', 'kinds', 'short', 'alone')
SHORT = ('topk', 'tome', 'token_transforming', 'random', 'divprune', 'fastv')
PADDED = (*SHORT, 'evit', 'ats', 'atc', 'kmedoids', 'visionzip', 'prumerge', 'framefusion',
          'hidrop', 'sparsevlm', 'dynamicvit')


def is_long(invariant, name):
  short = PADDED if invariant == 'padding' else SHORT
  return invariant in (*LONG, 'padding') and name not in short


# A method's invariants follow each other, so that one worker compiles them once.
PAIRS = [(invariant, name) for name in contract.names() for invariant in INVARIANTS]


@pytest.mark.parametrize(('invariant', 'name'), [
    pytest.param(*pair, marks=pytest.mark.long if is_long(*pair) else [], id='-'.join(pair))
    for pair in PAIRS])
def test_contract(invariant, name, record_property):
  record_property('contract', (PAIRS.index((invariant, name)), invariant, name))
  record_property('reason', INVARIANTS[invariant](name))


# Broken methods, each of which the contract must catch.


@dataclasses.dataclass(frozen=True)
class Broken(Reducer):
  """Keeps the tokens with the longest keys."""

  needs = frozenset({'keys'})
  drops = 'pruning drops tokens'

  def scores(self, keys):
    return jnp.sum(keys * keys, axis=(2, 3))

  def __call__(self, tokens, signals, *, num_slots):
    return keep_top(tokens, self.scores(signals.keys), num_slots=num_slots)


class CouplesRows(Broken):
  def scores(self, keys):
    return super().scores(keys) - 2 * jnp.roll(super().scores(keys), 1, axis=0)


class HighestTies(Broken):
  def __call__(self, tokens, signals, *, num_slots):
    return keep_top(tokens, self.scores(signals.keys) + 1e-3 * jnp.arange(tokens.slots)[None],
                    num_slots=num_slots)


class CountsPadding(Broken):
  def scores(self, keys):
    return super().scores(keys - jnp.mean(keys, axis=1, keepdims=True))


class KeepsPadding(Broken):
  def __call__(self, tokens, signals, *, num_slots):
    return Gather(top(self.scores(signals.keys), num_slots, forced=tokens.fixed), tokens.slots)


class DropsText(Broken):
  def __call__(self, tokens, signals, *, num_slots):
    first = jnp.arange(tokens.slots)[None] < 1
    return Gather(top(self.scores(signals.keys), num_slots, forced=first & tokens.real,
                      excluded=~tokens.real), tokens.slots)


class DropsClass(Broken):
  def __call__(self, tokens, signals, *, num_slots):
    picked = top(self.scores(signals.keys), num_slots, excluded=~tokens.real | tokens.fixed)
    return Gather(picked, tokens.slots)


class DividesByZero(Broken):
  def scores(self, keys):
    return jnp.sum(keys / jnp.linalg.norm(keys, axis=3, keepdims=True), axis=(2, 3))

  def __call__(self, tokens, signals, *, num_slots):
    picked = keep_top(tokens, self.scores(signals.keys), num_slots=num_slots)
    return Merge(picked.src, picked.dst, self.scores(signals.keys))


class ClaimsMass(Broken):
  drops = ''


class DeniesMass(ToMe):
  drops = 'so it says'


class LosesOne(Broken):
  def __call__(self, tokens, signals, *, num_slots):
    return super().__call__(tokens, signals, num_slots=num_slots - 1)


class HidesOne(Broken):
  def __call__(self, tokens, signals, *, num_slots):
    picked = super().__call__(tokens, signals, num_slots=num_slots)
    others = jnp.arange(num_slots)[None] < num_slots - 1
    return picked.replace(valid=tokens.real[:, :num_slots] & others)


class Repeats(Broken):
  def __call__(self, tokens, signals, *, num_slots):
    picked = super().__call__(tokens, signals, num_slots=num_slots)
    return picked.replace(src=picked.src.at[:, -1].set(picked.src[:, -2]))


class StrangeAnchor(ToMe):
  def __call__(self, tokens, signals, *, num_slots):
    merged = super().__call__(tokens, signals, num_slots=num_slots)
    return merged.replace(src=merged.src.at[:, 1:].set(jnp.roll(merged.src[:, 1:], 1, axis=1)))


@pytest.mark.parametrize(('broken', 'caught'), [
    (CouplesRows, 'alone permute'), (HighestTies, 'ties'), (CountsPadding, 'padding'),
    (KeepsPadding, 'padding short'), (DropsText, 'kinds'), (DropsClass, 'protect kinds'),
    (DividesByZero, 'finite'), (ClaimsMass, 'mass'), (DeniesMass, 'mass'), (LosesOne, 'shapes'),
    (HidesOne, 'filled'), (Repeats, 'matrix'), (StrangeAnchor, 'matrix')],
    ids=lambda value: getattr(value, '__name__', value))
def test_broken_methods_are_caught(broken, caught, monkeypatch):
  monkeypatch.setitem(REDUCERS, broken.__name__, broken)
  for invariant in caught.split():
    with pytest.raises(AssertionError):
      INVARIANTS[invariant](broken.__name__)


@pytest.mark.long
def test_the_unbroken_method_passes(monkeypatch):
  monkeypatch.setitem(REDUCERS, 'Broken', Broken)
  for check in INVARIANTS.values():
    check('Broken')
