"""Timing: turns, statistics and compile time, all on clocks that only the test moves."""

import itertools
import json
import statistics

import jax
import jax.numpy as jnp
import pytest

from lib.runtime import timing


class Clock:
  """Seconds that pass only when something says so."""

  def __init__(self):
    self.now = 0.0

  def __call__(self):
    return self.now


def candidates(clock, costs_s, log):
  """Functions that take their next cost, in seconds, off the clock each time they run."""

  def make(name, costs):
    left = iter(costs)

    def run():
      log.append(name)
      clock.now += next(left)
      return jnp.zeros(1)

    return run

  return {name: make(name, costs) for name, costs in costs_s.items()}


def test_each_round_runs_every_candidate_once_in_rotating_order():
  clock, log = Clock(), []
  forever = {name: itertools.repeat(1.0) for name in 'abc'}
  timing.interleave(candidates(clock, forever, log), rounds=4, warmup=2, clock=clock)
  rounds = [''.join(log[i:i + 3]) for i in range(0, len(log), 3)]
  assert rounds == ['bca', 'cab', 'abc', 'bca', 'cab', 'abc']


def test_warmup_does_not_count_and_runs_are_milliseconds_in_order():
  clock = Clock()
  costs = {'a': [9, 9, 0.001, 0.003, 0.002], 'b': [8, 8, 0.02, 0.04, 0.1]}
  found = timing.interleave(candidates(clock, costs, []), rounds=3, warmup=2, clock=clock)
  assert found['a'].runs == pytest.approx((1.0, 3.0, 2.0), rel=1e-9)
  assert found['a'].median_ms == pytest.approx(2.0)
  assert (found['a'].low_ms, found['a'].high_ms) == pytest.approx((1.5, 2.5))
  assert found['b'].median_ms == pytest.approx(40.0)


def test_a_run_lasts_until_its_arrays_are_computed(monkeypatch):
  clock = Clock()

  def wait(tree):
    clock.now += 5.0
    return tree

  monkeypatch.setattr(jax, 'block_until_ready', wait)
  found = timing.interleave({'a': lambda: (jnp.ones(2), {'x': jnp.ones(1)})}, rounds=2, warmup=0,
                            clock=clock)
  assert found['a'].runs == (5000.0, 5000.0)


def test_interleave_refuses_nothing_to_do():
  with pytest.raises(ValueError, match='at least one candidate'):
    timing.interleave({})
  with pytest.raises(ValueError, match='rounds=0'):
    timing.interleave({'a': lambda: jnp.ones(1)}, rounds=0)


def test_speedup_pairs_runs_of_the_same_round():
  # Both slow down together: every round says twice as fast, although the runs overlap.
  base = timing.Timing.of([10.0, 20.0, 40.0, 80.0])
  other = timing.Timing.of([5.0, 10.0, 20.0, 40.0])
  found = timing.speedup(base, other)
  assert found == timing.Speedup(2.0, 2.0, 2.0, 2.0)


def test_speedup_spread_is_quartiles_of_the_ratios_and_ratio_that_of_medians():
  base, other = timing.Timing.of([4.0, 9.0, 10.0]), timing.Timing.of([1.0, 3.0, 10.0])
  found = timing.speedup(base, other)
  assert found.ratio == pytest.approx(9.0 / 3.0)
  assert found.median == statistics.median([4.0, 3.0, 1.0])
  assert (found.low, found.high) == pytest.approx((2.0, 3.5))


def test_speedup_refuses_what_cannot_be_compared():
  with pytest.raises(ValueError, match='2 and 3'):
    timing.speedup(timing.Timing.of([1, 2]), timing.Timing.of([1, 2, 3]))
  with pytest.raises(ValueError, match='0 ms'):
    timing.speedup(timing.Timing.of([1.0, 1.0, 1.0]), timing.Timing.of([1.0, 0.0, 1.0]))


def test_compile_seconds_returns_a_program_and_only_its_compile_time():
  ticks = iter([100.0, 103.5])
  compiled, seconds = timing.compile_seconds(jax.jit(lambda x: 2 * x).lower(jnp.arange(3.0)),
                                             clock=lambda: next(ticks))
  assert seconds == 3.5
  assert compiled(jnp.arange(3.0)).tolist() == [0.0, 2.0, 4.0]


def test_machine_goes_into_json_and_names_this_one():
  found = json.loads(json.dumps(timing.machine()))
  assert found['platform'] == jax.default_backend()
  assert found['jax'] == jax.__version__
  assert found['cores'] >= 1
  assert all(value not in ('', None) for value in found.values())


def test_cpu_name_comes_from_where_linux_keeps_it(tmp_path):
  info = tmp_path / 'cpuinfo'
  info.write_text('processor\t: 0\nmodel name\t: Some Chip: 3 GHz\n')
  assert timing._cpu(info) == 'Some Chip: 3 GHz'
  assert timing._cpu(tmp_path / 'none')
