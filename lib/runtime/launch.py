"""The command line of a run; starting one process or many, and stopping them in good order."""

from __future__ import annotations

import os
import pathlib
import signal
from typing import Any

import jax
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
