"""Checkpoints: the state, the data iterator and the best so far, through orbax.

Written in the background, each in a folder that is renamed into place when whole, its checksums
included: a kill leaves the earlier ones untouched. The newest two and the best one are kept.
"""

from __future__ import annotations

import asyncio
import functools
import json
import pathlib
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN
from orbax.checkpoint.path import atomicity
from safetensors import safe_open
from safetensors.numpy import save_file

from lib.runtime import checksums, processes
from models.checkpoints import merge_params
from models.checkpoints.layout import flatten, nest

PACKED = 'model.safetensors'
OLD = '.old'
T = TypeVar('T')


class _Sealed(atomicity.AtomicRenameTemporaryPath):
  """A folder while it is written: a checkpoint gets its name once its checksums are in it."""

  def __init__(self, temporary_path: Any, final_path: Any, **options: Any) -> None:
    whole = temporary_path.with_name(f'{temporary_path.name}-whole')
    super().__init__(temporary_path, whole, **options)
    self._name = final_path

  def get_final(self) -> Any:
    """Returns the folder's path once it is whole."""
    return self._name

  async def finalize(self) -> None:
    """Lets orbax write its last file, then adds the checksums."""
    await super().finalize()
    whole = super().get_final()
    # Orbax does the same with each part of a checkpoint, whose files are on the list of the whole.
    if atomicity.TMP_DIR_SUFFIX not in whole.parent.name:
      await asyncio.to_thread(checksums.write, whole)
    whole.rename(self._name)


class Checkpoints:
  """The checkpoints of one run.

  Nothing on disk changes before `restore` or `save`; `best` and `read` change nothing ever.

  Args:
    folder: where they live; made if missing.
    parts: names of the trees that a checkpoint is made of, so that one can be read alone.
    metric: the name in `metrics` that decides which is best (higher is better).
  """

  def __init__(self, folder: str | pathlib.Path, *, parts: Sequence[str] = ('state', 'ema'),
               metric: str = 'accuracy') -> None:
    self._folder, self._parts, self._metric = pathlib.Path(folder).absolute(), parts, metric
    self._manager: ocp.CheckpointManager | None = None

  def save(self, step: int, parts: Mapping[str, Any], data: dict[str, Any], *,
           metrics: dict[str, float] | None = None) -> None:
    """Saves in the background; `data` is the iterator's state, JSON-like."""
    items = {name: ocp.args.StandardSave(parts[name]) for name in self._parts}
    items['data'] = ocp.args.JsonSave(data)
    manager = self._open()
    manager.wait_until_finished()
    self._remove_old()
    manager.save(step, args=ocp.args.Composite(**items), metrics=metrics, force=True)

  def restore(self, template: Mapping[str, Any]) -> tuple[int, Any, dict[str, Any]] | None:
    """Restores the newest checkpoint that is not damaged: (step, parts, data), None without any.

    The damaged ones are renamed, so that the run can come to their steps again.

    Args:
      template: the parts as ShapeDtypeStructs with the shardings to restore into, whatever the
        number of devices that saved them.

    Raises:
      ValueError: all are damaged, or the newest of the others has other shapes; nothing changed.
      OSError: one cannot be read now; nothing changed.
    """
    restored: tuple[int, Any, dict[str, Any]] | None = None
    damaged: dict[int, checksums.Damaged] = {}
    for step in reversed(self._steps()):
      try:
        if restored is None:
          parts, data = _together(functools.partial(self._read, step, template))
          restored = step, parts, data
        else:  # Of the older ones only scores matter now.
          _together(functools.partial(self._score, step))
      except checksums.Damaged as fault:
        damaged[step] = fault
    if damaged and restored is None:
      raise ValueError(f'all checkpoints in {self._folder} are damaged and stay as they are: '
                       f'{"; ".join(map(str, damaged.values()))}; take another workdir')
    if jax.process_count() > 1:
      self._check_shared()
    if restored:
      for step, reason in damaged.items():
        self._set_aside(step, reason, restored[0])
    self._open()
    return restored

  def best(self) -> int | None:
    """Returns the step of the best checkpoint, of the newest if none has a score.

    Raises:
      ValueError, OSError: a score is damaged, or cannot be read.
    """
    steps = self._steps()
    scores = {step: score for step in steps
              if (score := _together(functools.partial(self._score, step))) is not None}
    return max(scores, key=lambda step: (scores[step], step), default=max(steps, default=None))

  def read(self, step: int, part: str, template: Any) -> Any:
    """Reads one part of a checkpoint, without reading the others; template None for as it is.

    Raises:
      ValueError, OSError: it is damaged, has other shapes, or cannot be read, with what differs.
    """
    return _together(lambda: self._read_part(step, part, template, self._check(step, [
        part, '_CHECKPOINT_METADATA'])))

  def close(self) -> None:
    """Waits for writes in the background, then closes."""
    if self._manager:
      self._manager.close()
      self._remove_old()

  def _open(self) -> ocp.CheckpointManager:
    """Makes the manager that writes, once; what a kill left half-written or -removed goes."""
    if self._manager is None:
      self._remove_old()

      def score(metrics: Mapping[str, float]) -> float:
        return metrics[self._metric]

      best = BestN(get_metric_fn=score, n=1, keep_checkpoints_without_metrics=False)
      options = ocp.CheckpointManagerOptions(
          preservation_policy=AnyPreservationPolicy([LatestN(2), best]), best_fn=score,
          temporary_path_class=_Sealed, cleanup_tmp_directories=True, todelete_subdir=OLD)
      handlers = {name: ocp.StandardCheckpointHandler() for name in self._parts}
      handlers['data'] = ocp.JsonCheckpointHandler()
      self._manager = ocp.CheckpointManager(self._folder, options=options, item_handlers=handlers)
    return self._manager

  def _remove_old(self) -> None:
    """Removes the checkpoints that are no longer kept, which orbax has renamed.

    Were they removed under their names, a kill could leave half of one there.
    """
    if jax.process_index() == 0:
      shutil.rmtree(self._folder / OLD, ignore_errors=True)

  def _check_shared(self) -> None:
    """Raises where the folder is not one and the same: orbax would wait in vain for its files."""
    mark = self._folder / processes.gather(f'.shared-{time.time_ns()}')[0]
    if jax.process_index() == 0:
      self._folder.mkdir(parents=True, exist_ok=True)
      mark.touch()
    processes.gather('touched')
    seen = processes.gather(mark.exists())
    if jax.process_index() == 0:
      mark.unlink()
    if not all(seen):
      raise ValueError(self._unshared(f'process {seen.index(False)} does not see what process 0 '
                                      'writes'))

  def _unshared(self, reason: str) -> str:
    return (f'{self._folder} is not the same for all processes ({reason}): give them one '
            '--workdir, in storage that they share')

  def _steps(self) -> list[int]:
    names = [path.name for path in self._folder.iterdir()] if self._folder.exists() else []
    seen = processes.gather(sorted(int(name) for name in names if name.isdecimal()))
    if any(other != seen[0] for other in seen):
      raise ValueError(self._unshared(f'they see the steps {seen}'))
    return seen[0]

  def _score(self, step: int) -> float | None:
    self._check(step, ['metrics'])
    file = self._folder / str(step) / 'metrics' / 'metrics'
    if not file.exists():
      return None
    try:
      scores = {name: float(score) for name, score in json.loads(file.read_text()).items()}
    except (ValueError, AttributeError, TypeError) as fault:
      raise checksums.Damaged(f'{file} cannot be decoded ({_first_line(fault)})') from fault
    if self._metric not in scores:
      raise ValueError(f'{self._folder} is of another task, whose score is {", ".join(scores)} and '
                       f'not {self._metric}: use the config that wrote it, or another workdir')
    return scores[self._metric]

  def _read(self, step: int, template: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    listed = self._check(step)
    if not listed:
      logging.warning('%s has no checksums, as those of earlier versions: only what cannot be '
                      'decoded shows damage', self._folder / str(step))
    parts = {name: self._read_part(step, name, template[name], listed) for name in self._parts}
    data = self._decode(
        step, listed, lambda folder: ocp.JsonCheckpointHandler().restore(folder / 'data'))
    return parts, data

  def _read_part(self, step: int, part: str, template: Any, listed: bool) -> Any:
    handler = ocp.StandardCheckpointHandler()
    tree = self._decode(step, listed, lambda folder: handler.metadata(folder / part).tree)
    if template is None:
      here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
      template = jax.tree.map(
          lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), tree)
    try:
      check_shapes(template, tree)
    except ValueError as fault:
      raise ValueError(f'checkpoint {step} in {self._folder} is of another model: {fault}; use '
                       'the config that wrote it, or another workdir') from fault
    return self._decode(step, listed, lambda folder: handler.restore(
        folder / part, args=ocp.args.StandardRestore(template)))

  def _check(self, step: int, names: Sequence[str] = ()) -> bool:
    try:
      return checksums.check(self._folder / str(step), names)
    except OSError as fault:
      raise _unreadable(self._folder / str(step), fault) from fault

  def _decode(self, step: int, listed: bool, read: Callable[[pathlib.Path], T]) -> T:
    folder = self._folder / str(step)
    try:
      return read(folder)
    except Exception as fault:  # Orbax raises a different class for each kind of fault.
      if listed:
        raise _unreadable(folder, fault) from fault
      raise checksums.Damaged(f'{folder} cannot be decoded ({_first_line(fault)})') from fault

  def _set_aside(self, step: int, reason: Exception, restored: int) -> None:
    """Renames a checkpoint, out of orbax's numbering."""
    aside = self._folder / f'damaged-{step}-{time.strftime("%Y%m%d-%H%M%S")}'
    if jax.process_index() == 0:
      (self._folder / str(step)).rename(aside)
      logging.warning('%s: renamed the checkpoint to %s; going on from step %d', reason, aside.name,
                      restored)
    processes.gather('renamed')


def best(workdir: str | pathlib.Path, template: Any, *, metric: str) -> tuple[int, Any] | None:
  """Step and averaged parameters of a run's best checkpoint, None where there is no checkpoint.

  Args:
    workdir: of the run, or a folder that `pack` wrote.
    template: the parameters as ShapeDtypeStructs with the shardings to restore into; None for those
      that are there, as they are.
    metric: which score decided, as in `Checkpoints`.

  Raises:
    ValueError: it cannot be read into this model, with what differs.
  """
  folder, packed = pathlib.Path(workdir) / 'checkpoints', pathlib.Path(workdir) / PACKED
  if packed.exists():
    check_packed(workdir, [PACKED])
    with safe_open(packed, framework='numpy') as file:
      step = int(file.metadata()['step'])
      arrays = nest({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    if template is None:
      return step, arrays
    check_shapes(template, arrays)
    return step, merge_params(template, arrays)
  checkpoints = Checkpoints(folder, metric=metric)
  try:
    best_step = checkpoints.best()
    return None if best_step is None else (best_step, checkpoints.read(best_step, 'ema', template))
  except checksums.Damaged as fault:
    raise ValueError(f'{fault}; move that checkpoint away to use another') from fault


def pack(params: Any, step: int, folder: str | pathlib.Path) -> pathlib.Path:
  """Writes averaged parameters as one small file that `best` reads, in the form they have here.

  Args:
    params: a tree of dicts of arrays.
    step: after which they were taken.
    folder: where to; made if missing.
  """
  path = pathlib.Path(folder) / PACKED
  path.parent.mkdir(parents=True, exist_ok=True)
  arrays = {name: np.ascontiguousarray(value) for name, value in flatten(params).items()}
  save_file(arrays, path, metadata={'step': str(step)})
  return path


def check_packed(folder: str | pathlib.Path, names: Sequence[str]) -> None:
  """Compares files that tools/pack.py wrote with their checksums, where there are any.

  Raises:
    ValueError: one differs.
  """
  try:
    if not checksums.check(folder, names):
      logging.warning('%s in %s: no checksums, as of earlier versions', ', '.join(names), folder)
  except checksums.Damaged as fault:
    raise ValueError(f'{fault}: pack the run again; if the change is meant, write the sum anew, as '
                     'by sha256sum') from fault


def check_shapes(template: Any, tree: Any) -> None:
  """Raises ValueError naming the first leaves that one tree has and the other lacks, or shapes."""
  wanted, stored = _shapes(template), _shapes(tree)
  missing, extra = sorted(wanted.keys() - stored.keys()), sorted(stored.keys() - wanted.keys())
  if missing or extra:
    raise ValueError(f'trees differ: the checkpoint lacks {missing[:3]} and has {extra[:3]} that '
                     f'the model does not ({len(missing)} and {len(extra)} in all)')
  for name, shape in wanted.items():
    if shape != stored[name]:
      raise ValueError(f'{name} has shape {stored[name]} in the checkpoint and {shape} in the '
                       'model')


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
  leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
  names = ('/'.join(str(getattr(p, 'key', getattr(p, 'name', getattr(p, 'idx', p))))
                    for p in path) for path, _ in leaves)
  return {name: tuple(leaf.shape) for name, (_, leaf) in zip(names, leaves, strict=True)}


def _first_line(fault: Exception) -> str:
  return f'{type(fault).__name__}: {fault}'.splitlines()[0][:300]


def _unreadable(folder: pathlib.Path, fault: Exception) -> OSError:
  return OSError(f'{folder} cannot be read now, and nothing is changed: {_first_line(fault)}; try '
                 'again, or move the folder away to go on without it')


def _together(read: Callable[[], T]) -> T:
  """Returns what this process reads; a fault in one of them is raised in all, the gravest first."""
  if jax.process_count() == 1:
    return read()
  found, fault = None, None
  try:
    found = read()
  except (ValueError, OSError) as error:
    fault = isinstance(error, checksums.Damaged), f'in process {jax.process_index()}, {error}'
  faults = [tuple(each) for each in processes.gather(fault) if each]
  if faults:
    damaged, text = min(faults)
    raise (checksums.Damaged if damaged else ValueError)(text)
  return cast(T, found)
