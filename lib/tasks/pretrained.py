"""Pretrained parts of a model, and those parameters that stay as they are while others train.

`config.optimizer.frozen` names groups of parameters by the beginnings of their paths, as
('tower', 'lm'). They have no gradient, no state of the optimizer and no average, and no checkpoint
holds them: they are read from their files again. What a learned reduction adds inside of such a
group is not pretrained, and trains.

A part may also come from a run that learned to answer questions: `config.model.tower` or `.lm` is
then that run's workdir, or what tools/pack.py made of it. It is taken without the dropout and the
reductions that it was trained with.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from lib.runtime import checkpoint, sharding
from models import checkpoints
from models.backbones.lm import LM
from models.backbones.vit import ViT
from models.backbones.vlm import VLM
from models.checkpoints import files, gguf, lm_config, vit_config
from models.checkpoints.json_files import read_json
from models.checkpoints.layout import flatten, nest
from models.projector import neighbours_as_one, without_special
from models.projectors.mlp import NORM_EPS
from models.storage import to_storage

# Parameters of learned reductions, and of what reads a compressor's memory.
LEARNED = ('reducer_', 'reader/')
Params = dict[str, Any]


def language_model(source: str, **fields: Any) -> LM:
  """The language model that a checkpoint's folder, or a .gguf file, describes.

  Raises:
    ValueError: it is not there, or as models/checkpoints does.
  """
  path = _located(source, 'lm')
  config = gguf.config(path) if path.suffix == gguf.SUFFIX else files.config(path)
  return lm_config.from_config(config, **fields)


def tower(source: str, **fields: Any) -> ViT:
  """The vision transformer that a checkpoint's folder describes.

  Raises:
    ValueError: it is not there, holds another model, or as models/checkpoints does.
  """
  vit = vit_config.from_config(files.config(_located(source, 'tower')))
  if not isinstance(vit, ViT):
    raise ValueError(f'config.model.tower={source} is no vision transformer alone: name the folder '
                     'of one')
  return vit.clone(num_classes=0, **fields)


def with_runs(config: Mapping[str, Any]) -> Mapping[str, Any]:
  """Returns `config.model` with the fields of parts that are of runs in place of their folders."""
  found: dict[str, Any] = {}
  for part, fields in (('tower', {'dropout': 0.0}), ('lm', {})):
    source: Any = config.get(part)
    while _is_run(source):
      # Where that one began from files, they say what it is.
      source = read_json(pathlib.Path(source) / 'config.json')['model'].get(part)
      found[part] = {**source, **fields} if hasattr(source, 'keys') else source
  return {**config, **found}


def load(config: Mapping[str, Any], model: LM | VLM) -> Params | None:
  """Reads the parts of a model that its config names by their files: {'tower': ..., 'lm': ...}.

  Args:
    config: `config.model`.
    model: of it.

  Returns:
    float32 arrays; None where nothing is pretrained.

  Raises:
    ValueError: as `models.checkpoints.load`.
  """
  loaded: Params = {part: _params_of_run(config[part], part) for part in ('tower', 'lm')
                    if _is_run(config.get(part))}
  if isinstance(config['lm'], str) and 'lm' not in loaded:
    lm = model.lm if isinstance(model, VLM) else model
    loaded['lm'] = checkpoints.load(lm.clone(plan=None, cache_plan=None), config['lm'])
  if isinstance(model, VLM) and isinstance(config['tower'], str) and 'tower' not in loaded:
    vit = tower(config['tower'])
    params = checkpoints.load(vit, config['tower'])
    loaded['tower'] = checkpoints.resize_positions(params, vit, image_size=model.tower.image_size)
  if loaded and not isinstance(model, VLM):
    return loaded['lm']
  return loaded or None


def standardising(model: VLM, params: Params, images: np.ndarray) -> Params:
  """Returns 'scale' and 'bias' of the projector's norm, float32[W], that standardise its features.

  Args:
    model: with a pretrained tower.
    params: of the tower.
    images: float[B, S, S, C].
  """
  whole = model.tower.clone(plan=None)

  def moments(params: Params, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    tokens = without_special(whole.apply({'params': params}, images)[1]['tokens'], model.special)
    x = neighbours_as_one(tokens, whole.grid, model.side).x.astype(jnp.float32)
    x = jax.nn.standardize(x, axis=-1, epsilon=NORM_EPS)
    return x.mean(axis=(0, 1)), x.std(axis=(0, 1))

  mean, spread = jax.device_get(jax.jit(moments)(params, images))
  return {'scale': 1 / spread, 'bias': -mean / spread}


def _located(source: str, key: str) -> pathlib.Path:
  path = pathlib.Path(source)
  if not path.exists():
    raise ValueError(f'config.model.{key}={source} is not there: `python -m tools.real.fetch` '
                     'fetches pretrained parts, or name another')
  return path


def _is_run(source: Any) -> bool:
  """Whether a part of a model is of a run, and not of a checkpoint's folder."""
  file = pathlib.Path(source, 'config.json') if isinstance(source, str) else None
  return file is not None and file.exists() and 'model' in read_json(file)


def _params_of_run(source: str, part: str) -> Params:
  """Averaged parameters of a part, of a run's best checkpoint."""
  best = checkpoint.best(source, None, metric='accuracy')
  if best is None:
    raise ValueError(f'config.model.{part}={source} has no checkpoint: name the workdir of a run '
                     'that has one')
  if part not in best[1]:
    raise ValueError(f'config.model.{part}={source} is a run that did not train its {part}: name '
                     'what its own config.json names')
  return best[1][part]


def names(config: ConfigDict) -> tuple[str, ...]:
  """The groups that stay as they are, () for none."""
  return tuple((config.get('optimizer') or {}).get('frozen') or ())


def split(params: Params, frozen: Sequence[str]) -> tuple[Params, Params]:
  """Divides parameters into those that train and those that do not.

  Args:
    params: a tree of dicts, of anything.
    frozen: beginnings of paths.

  Raises:
    ValueError: a name that no path begins with.
  """
  if not frozen:
    return params, {}
  flat = flatten(params)
  apart = {path: leaf for path, leaf in flat.items() if _within(path, frozen)}
  for name in frozen:
    if not any(_within(path, [name]) for path in apart):
      raise ValueError(f'optimizer.frozen names {name!r}, and the model has no such group of '
                       f'parameters: name some of {", ".join(sorted(params))}')
  return nest({path: leaf for path, leaf in flat.items() if path not in apart}), nest(apart)


def _within(path: str, groups: Sequence[str]) -> bool:
  """Whether a path is in one of the groups, and not of a learned reduction or a reader."""
  learned = any(f'/{start}' in f'/{path}' for start in LEARNED)
  return not learned and any(f'{path}/'.startswith(f'{name}/') for name in groups)


def join(trained: Params, frozen: Params | None) -> Params:
  """Returns all parameters of what `split` divided."""
  return nest(flatten(trained) | flatten(frozen)) if frozen else trained


def trained_part(loaded: Params | None, config: ConfigDict) -> Params | None:
  """Returns those of the pretrained parameters that train on; None for none."""
  frozen = names(config)
  return loaded and nest({path: leaf for path, leaf in flatten(loaded).items()
                          if not _within(path, frozen)})


def read_frozen(init: Callable[[jax.Array], Params], pretrained: Callable[[], Params | None],
                config: ConfigDict, mesh: Mesh) -> Params:
  """Reads the parameters that stay as they are.

  Args:
    init: key -> all parameters.
    pretrained: reads all those that are (`load`).
    config: of the run.
    mesh: where they go.

  Returns:
    In the dtype of the products, blocks as a tuple; {} for none.

  Raises:
    ValueError: groups that nothing pretrained is for; or as `split` and `load`.
  """
  chosen = names(config)
  if not chosen:
    return {}
  wanted = split(jax.eval_shape(init, jax.random.key(0)), chosen)[1]
  loaded = pretrained() or {}
  missing = sorted(flatten(wanted).keys() - flatten(loaded).keys())
  if missing:
    raise ValueError(f'optimizer.frozen={chosen} has parameters that no pretrained file gives, '
                     f'such as {missing[0]}: leave that group out, or name its file in '
                     'config.model')
  dtype = jnp.dtype(config.model.get('dtype') or 'float32')
  shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), wanted)
  placed = sharding.shapes(shapes, sharding.make_shardings(shapes, config.sharding, mesh))
  kept = {path: array for path, array in flatten(loaded).items() if path in flatten(wanted)}
  # Through stacked blocks a gradient would copy every weight.
  return to_storage(checkpoints.merge_params(placed, nest(kept)), 'unstacked')


def best(workdir: str | pathlib.Path, init: Callable[[jax.Array], Params],
         read: Callable[[], Params | None], config: ConfigDict, mesh: Mesh, *,
         metric: str) -> tuple[int, Params] | None:
  """Step and averaged parameters of a run's best checkpoint, and with them what was frozen.

  Args:
    workdir: of the run, or a folder that tools/pack.py wrote.
    init, read, config, mesh: as of `read_frozen`, which calls the second `pretrained`.
    metric: as of `checkpoint.best`.

  Returns:
    None where there is no checkpoint.

  Raises:
    ValueError: as `checkpoint.best` and `read_frozen`.
  """
  wanted, _ = split(jax.eval_shape(init, jax.random.key(0)), names(config))
  template = sharding.shapes(wanted, sharding.make_shardings(wanted, config.sharding, mesh))
  found = checkpoint.best(workdir, template, metric=metric)
  return found and (found[0], join(found[1], read_frozen(init, read, config, mesh)))
