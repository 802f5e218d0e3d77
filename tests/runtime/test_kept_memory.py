"""Memory that a process has freed stays with it."""

import ctypes

import pytest
from helpers import processes

KEPT = '''
import resource
import numpy as np
from lib.runtime import memory

def faults():
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  for _ in range(4):
    np.ones(2 ** 25, np.uint8)
  return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

mapped = faults()
memory.keep()
faults()
print(faults() < mapped / 4)
'''


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), 'gnu_get_libc_version'), reason='not glibc')
def test_what_is_freed_stays_with_the_process():
  """Arrays of 32 MB come out of memory that is mapped already."""
  run = processes.Process('-c', KEPT)
  said, problem = run.communicate()
  assert said.strip() == 'True', problem
