"""Checkpoints: the state, the data iterator and the best so far, through orbax.

Written in the background, each in a folder that is renamed into place when whole: a kill leaves
the earlier ones untouched. The newest two and the best one are kept.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN
from safetensors import safe_open
from safetensors.numpy import save_file

from models.checkpoints import merge_params
from models.checkpoints.layout import flatten, nest

PACKED = 'model.safetensors'


class Checkpoints:
  """The checkpoints of one run.

  Args:
    folder: where they live; made if missing.
    parts: names of the trees that a checkpoint is made of, so that one can be read alone.
    metric: the name in `metrics` that decides which is best (higher is better).
  """

  def __init__(self, folder: str | pathlib.Path, *, parts: Sequence[str] = ('state', 'ema'),
               metric: str = 'accuracy') -> None:
    best = BestN(get_metric_fn=lambda metrics: metrics[metric], n=1,
                 keep_checkpoints_without_metrics=False)
    options = ocp.CheckpointManagerOptions(
        preservation_policy=AnyPreservationPolicy([LatestN(2), best]),
        best_fn=lambda metrics: metrics[metric], best_mode='max',
        cleanup_tmp_directories=True)
    handlers = {name: ocp.StandardCheckpointHandler() for name in parts}
    handlers['data'] = ocp.JsonCheckpointHandler()
    self._parts = parts
    self._manager = ocp.CheckpointManager(pathlib.Path(folder).absolute(), options=options,
                                          item_handlers=handlers)

  def save(self, step: int, parts: Mapping[str, Any], data: dict[str, Any], *,
           metrics: dict[str, float] | None = None) -> None:
    """Saves in the background; `data` is the iterator's state, JSON-like."""
    items = {name: ocp.args.StandardSave(parts[name]) for name in self._parts}
    items['data'] = ocp.args.JsonSave(data)
    self._manager.save(step, args=ocp.args.Composite(**items), metrics=metrics, force=True)

  def restore(self, template: Mapping[str, Any]) -> tuple[int, Any, dict[str, Any]] | None:
    """Restores the newest readable checkpoint: (step, parts, data), None if there is none.

    Args:
      template: the parts as ShapeDtypeStructs with the shardings to restore into, whatever the
        number of devices that saved them.

    Raises:
      ValueError: when checkpoints exist and none fits, with what differs.
    """
    faults = {}
    for step in sorted(self._manager.all_steps(), reverse=True):
      try:
        parts = {name: self._read(step, name, template[name]) for name in self._parts}
        items = ocp.args.Composite(data=ocp.args.JsonRestore())
        data = self._manager.restore(step, args=items)['data']
      except Exception as fault:  # Orbax raises a different class for each kind of damage.
        faults[step] = f'step {step}: {_first_line(fault)}'
        continue
      for damaged, reason in faults.items():
        # An older one fits, so these are broken, and the run will come to their steps again.
        logging.warning('deleting the checkpoint of %s; going on from step %d', reason, step)
        self._manager.delete(damaged)
      return step, parts, data
    if faults:
      raise ValueError(f'no checkpoint in {self._manager.directory} can be read into this model '
                       f'({"; ".join(faults.values())}): use the config that wrote them, or '
                       'another workdir')
    return None

  def _read(self, step: int, part: str, template: Any) -> Any:
    check_shapes(template, self._manager.item_metadata(step)[part].tree)
    items = ocp.args.Composite(**{part: ocp.args.StandardRestore(template)})
    return self._manager.restore(step, args=items)[part]

  def best(self) -> int | None:
    """Returns the step of the best checkpoint, of the newest if none has a score."""
    return self._manager.best_step() or self._manager.latest_step()

  def read(self, step: int, part: str, template: Any) -> Any:
    """Reads one part of a checkpoint, without reading the others.

    Raises:
      ValueError: where it cannot be read or has other shapes, with what differs.
    """
    try:
      return self._read(step, part, template)
    except Exception as fault:
      raise ValueError(f'checkpoint {step} in {self._manager.directory} cannot be read: '
                       f'{_first_line(fault)}; use the config that wrote it, or another step of '
                       f'{sorted(self._manager.all_steps())}') from fault

  def close(self) -> None:
    """Waits for writes in the background, then closes."""
    self._manager.wait_until_finished()
    self._manager.close()


def best(workdir: str | pathlib.Path, template: Any, *, metric: str) -> tuple[int, Any] | None:
  """Step and averaged parameters of a run's best checkpoint, None where there is no checkpoint.

  Args:
    workdir: of the run, or a folder that `pack` wrote.
    template: the parameters as ShapeDtypeStructs with the shardings to restore into.
    metric: which score decided, as in `Checkpoints`.

  Raises:
    ValueError: it cannot be read into this model, with what differs.
  """
  folder, packed = pathlib.Path(workdir) / 'checkpoints', pathlib.Path(workdir) / PACKED
  if packed.exists():
    with safe_open(packed, framework='numpy') as file:
      step = int(file.metadata()['step'])
      arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    check_shapes(template, nest(arrays))
    return step, merge_params(template, nest(arrays))
  if not folder.exists():
    return None
  checkpoints = Checkpoints(folder, metric=metric)
  best_step = checkpoints.best()
  step_and_params = (None if best_step is None else
                     (best_step, checkpoints.read(best_step, 'ema', template)))
  checkpoints.close()
  return step_and_params


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
