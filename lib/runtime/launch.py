"""The command line of a run; starting one process or many, and stopping them in good order."""

from __future__ import annotations

import pathlib
import signal
from typing import Any

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils

from lib.runtime import config_flag

CONFIG = config_flag.define('The experiment, a file of configs/; what follows a colon is passed on '
                            'to its get_config.')
WORKDIR = flags.DEFINE_string(
    'workdir', None, 'Where checkpoints, logs and results are; a run goes on from what is there.')
COORDINATOR = flags.DEFINE_string(
    'coordinator', None, "host:port of process 0 for several processes; 'auto' on a pod or Slurm.")
PROCESSES = flags.DEFINE_integer('processes', None, 'Processes in all, with --coordinator.')
PROCESS = flags.DEFINE_integer('process', None, "This process's index, with --coordinator.")
CACHE = flags.DEFINE_string(
    'compile_cache', str(pathlib.Path.home() / '.cache' / 'winnow' / 'xla'),
    'Where compiled programs are kept between runs; empty for nowhere.')


def start() -> bool:
  """Joins the other processes if there are any; True in the one that writes logs."""
  if CACHE.value:
    jax.config.update('jax_compilation_cache_dir', CACHE.value)
  if COORDINATOR.value == 'auto':
    jax.distributed.initialize()
  elif COORDINATOR.value:
    if PROCESSES.value is None or PROCESS.value is None:
      raise ValueError(f'--coordinator={COORDINATOR.value} needs --processes and --process: how '
                       'many there are, and which this is')
    jax.distributed.initialize(COORDINATOR.value, PROCESSES.value, PROCESS.value,
                               initialization_timeout=120)
  return jax.process_index() == 0


class Stop:
  """Turns signals into an answer that the loop asks for between steps."""

  def __init__(self, *signals: int) -> None:
    self._requested = False
    self._before = {number: signal.signal(number, self._ask) for number in signals}

  def close(self) -> None:
    """Restores the signal handlers from before."""
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def _ask(self, number: int, frame: Any) -> None:
    del number, frame
    self._requested = True

  def should_stop(self, exchange: bool) -> bool:
    """Returns whether to stop now.

    A signal may have reached only one of several processes, so they stop together, when `exchange`
    is true in all of them.
    """
    if jax.process_count() == 1:
      return self._requested
    return exchange and bool(np.any(multihost_utils.process_allgather(np.asarray(self._requested))))
