"""The command line of a run; starting one process or many, and stopping them in good order."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import signal
from collections.abc import Iterator
from typing import Any

import flax.traverse_util
import jax
from absl import flags
from jax.experimental import multihost_utils

from lib.runtime import config_flag, memory, processes

CONFIG = config_flag.define('The experiment, a file of configs/; what follows a colon is passed on '
                            'to its get_config.')
WORKDIR = flags.DEFINE_string(
    'workdir', None, 'Where checkpoints, logs and results are; a run goes on from what is there.')
COORDINATOR = flags.DEFINE_string(
    'coordinator', None, "host:port of process 0 for several processes; 'auto' on a pod or Slurm.")
PROCESSES = flags.DEFINE_integer('processes', None, 'Processes in all, with --coordinator.')
PROCESS = flags.DEFINE_integer('process', None, "This process's index, with --coordinator.")
PEER_TIMEOUT = flags.DEFINE_integer(
    'peer_timeout', 60, 'Seconds after which one of several processes that does not come, or is '
    'silent, ends all of them.', lower_bound=1, upper_bound=86400)
CACHE = flags.DEFINE_string(
    'compile_cache', str(pathlib.Path.home() / '.cache' / 'winnow' / 'xla'),
    'Where compiled programs are kept between runs; empty for nowhere.')


@contextlib.contextmanager
def start() -> Iterator[bool]:
  """Joins the other processes if there are any; gives True in the one that writes logs.

  Inside, an error of one process, or its end, ends all of them with exit code 2.

  Raises:
    ValueError, OSError: flags that do not go together; the others cannot be joined.
  """
  if CACHE.value:
    jax.config.update('jax_compilation_cache_dir', CACHE.value)
  together: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
  address, count, index = COORDINATOR.value, PROCESSES.value, PROCESS.value
  if address == 'auto':
    try:
      jax.distributed.initialize(initialization_timeout=PEER_TIMEOUT.value,
                                 heartbeat_timeout_seconds=PEER_TIMEOUT.value)
    except ValueError as fault:
      raise ValueError(f'--coordinator=auto finds no TPU pod and no Slurm here ({fault}): give '
                       'host:port of process 0, --processes and --process') from fault
  elif address and count is not None and index is not None:
    about = {'config': json.loads(CONFIG.value.to_json_best_effort()),
             'workdir': os.path.abspath(WORKDIR.value or '')}
    together = processes.joined(address, count, index, timeout=PEER_TIMEOUT.value,
                                about=flax.traverse_util.flatten_dict(about, sep='.'))
  elif address or count is not None or index is not None:
    raise ValueError('several processes need all of --coordinator, where process 0 is, '
                     '--processes, how many there are, and --process, which this is')
  with together:
    if jax.default_backend() == 'cpu':
      memory.keep()
    yield jax.process_index() == 0


class Stop:
  """Turns SIGTERM, SIGINT and SIGHUP into an answer that the loop asks for between steps.

  A SIGHUP that nohup hides stays hidden. Of several processes each may get the signal: JAX's
  preemption service tells all of them, beside the computation, and names a step that all have
  still before them. It waits for SIGTERM itself, which therefore keeps its handler, and which the
  other signals become.
  """

  def __init__(self) -> None:
    self._requested = False
    self._several = jax.process_count() > 1
    asked = [signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
      asked.append(signal.SIGHUP)
    if not self._several:
      asked.append(signal.SIGTERM)
    self._before = {number: signal.signal(number, self._ask) for number in asked}

  def close(self) -> None:
    """Restores the signal handlers from before."""
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def _ask(self, number: int, frame: Any) -> None:
    del number, frame
    self._requested = True
    if self._several:
      os.kill(os.getpid(), signal.SIGTERM)

  def should_stop(self, step: int) -> bool:
    """Returns whether to stop after a step, the same in all processes; ask after every step."""
    if self._several:
      return multihost_utils.reached_preemption_sync_point(step)
    return self._requested
