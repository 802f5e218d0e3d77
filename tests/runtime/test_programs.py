"""Compiled programs go before a process has no memory maps left."""

import jax
import jax.numpy as jnp
import pytest

from lib import programs


def test_they_go_when_they_are_many(tmp_path, monkeypatch):
  maps, most = tmp_path / 'maps', tmp_path / 'most'
  monkeypatch.setattr(programs, 'MAPS', maps)
  monkeypatch.setattr(programs, 'MOST', most)
  assert not programs.let_go()  # Nothing says how many there are.
  most.write_text('10\n')
  maps.write_text('one\n' * 6)
  cleared = []
  monkeypatch.setattr(jax, 'clear_caches', lambda: cleared.append(1))
  assert not programs.let_go()
  maps.write_text('one\n' * 7)
  assert programs.let_go()
  assert cleared == [1]


@pytest.mark.long
def test_a_program_that_went_is_compiled_again():
  traced = []
  program = jax.jit(lambda x: traced.append(1) or x + 1)
  assert program(jnp.zeros(())) == 1
  assert programs.let_go(0)
  assert program(jnp.zeros(())) == 1
  assert len(traced) == 2
