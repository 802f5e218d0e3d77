"""Keeps a process from running out of memory maps, of which each compiled program takes a few.

Linux gives a process 65,530 (vm.max_map_count); one that asks for more is killed while it compiles.
"""

import pathlib

import jax

MAPS, MOST = pathlib.Path('/proc/self/maps'), pathlib.Path('/proc/sys/vm/max_map_count')


def let_go(share: float = 0.6) -> bool:
  """Lets all compiled programs go where they take much of what a process may have.

  They are compiled again when they are next called. Programs that were compiled ahead stay.

  Args:
    share: of all memory maps, from which on they go.

  Returns:
    Whether they went; False on systems that do not say how many there are.
  """
  if not (MAPS.exists() and MOST.exists()):
    return False
  if MAPS.read_bytes().count(b'\n') <= share * int(MOST.read_text()):
    return False
  jax.clear_caches()
  return True
