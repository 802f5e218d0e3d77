"""Bad inputs of all kinds end in one line: none in a traceback, in silence, or never."""

import shlex

import pytest
from fuzz import worker
from fuzz.case import FAULTY

pytestmark = pytest.mark.long


@pytest.fixture(scope='session')
def shared(tmp_path_factory):
  return tmp_path_factory.mktemp('shared')


@pytest.mark.parametrize('kind', worker.KINDS)
def test_bad_input_is_refused_in_one_line(kind, shared):
  names = list(worker.cases(kind))
  found = worker.faults(kind, names, shared)
  assert not found, '\n'.join((f'{len(found)} of {len(names)} went wrong:', *(
      f'{fault}\n  python tests/fuzz/worker.py {shlex.join((kind, name))}'
      for name, fault in found.items())))


def test_there_are_hundreds():
  bad = {kind: sum(not case.fine for case in worker.cases(kind).values()) for kind in worker.KINDS}
  assert sum(bad.values()) >= 300, bad
  assert min(bad.values()) >= 20, bad


def test_every_fault_is_found(shared):
  found = worker.faults(FAULTY, list(worker.cases(FAULTY)), shared)
  assert found.keys() == worker.cases(FAULTY).keys()
  assert all(fault.startswith(name) for name, fault in found.items()), found
