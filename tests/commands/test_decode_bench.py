"""The benchmark of decoding: what its rows say of a tiny run."""

import jax
import pytest
from absl import flags

from tools import decode_bench


@pytest.fixture
def parsed():
  flags.FLAGS.mark_as_parsed()
  saved = decode_bench.TOKENS.value, decode_bench.ROUNDS.value
  flags.FLAGS.tokens, flags.FLAGS.rounds = 2, 2
  yield
  flags.FLAGS.tokens, flags.FLAGS.rounds = saved


@pytest.mark.long
def test_rows_of_the_small_model(parsed, monkeypatch):
  plans = decode_bench.PLANS['scenes']
  monkeypatch.setitem(decode_bench.PLANS, 'scenes', {
      name: plans[name] for name in ('unreduced', 'divprune, projector, 16 of 64')})
  full, reduced = decode_bench.measured('scenes', (1e11, 1e10))
  assert (full['first_speedup'], full['token_speedup'], full['kv_ratio']) == (1, 1, 1)
  assert reduced['kv_ratio'] == pytest.approx(28 / 76, abs=1e-4)
  assert reduced['cached'] == [28] * 4
  assert reduced['macs_ratio'] < 0.4 < reduced['token_bytes_ratio'] < 1
  assert [row['fault'] for row in (full, reduced)] == ['', '']
  text = decode_bench.table([full, reduced])
  assert len({line.count('|') for line in text.splitlines()[2:]}) == 1


def test_a_step_that_copies_is_a_fault():
  row = {'model': 'lm', 'temporaries_share': 0.05}
  assert decode_bench.fault(row, 100, 100) == ''
  assert 'not written in place' in decode_bench.fault(row, 99, 100)
  assert '20% of the cache' in decode_bench.fault(row | {'temporaries_share': 0.2}, 100, 100)


def test_no_plan_touches_the_question():
  case = decode_bench.language(**decode_bench.PLANS['lm']['fastv, layer 2, 50 %'])
  cut, = case.lm.plan.events
  assert (cut.slots_in, cut.slots_out) == (4096, 64 + (4096 - 64) // 2)
  _, cache = jax.eval_shape(case.first, shapes(case), *case.inputs)
  assert [kv.filled for kv in cache.layers] == [4096] * 2 + [2080] * 14


def shapes(case):
  plain = case.lm.clone(plan=None)
  return jax.eval_shape(plain.init, jax.random.key(0), case.inputs[0][:, :4])['params']
