"""Foreign checkpoints to our parameter tree and back: safetensors, and GGUF to read.

  params = load(make_vit('dinov2_s14'), 'facebook/dinov2-small')

Our tree has its blocks stacked [L, ...] (models/stack.py). Tensors are read one by one, and every
one must find its place: what is missing, left over or of another shape is an error that lists it.
Stored as bfloat16, float16, float32 or float64 they become `dtype`; quantized ones are refused in
safetensors, and dequantized in GGUF.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import fnmatch
import functools
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from safetensors.numpy import save_file

from models.backbones.bert import Bert
from models.backbones.clip import Clip
from models.backbones.lm import LM
from models.backbones.qwen_vision import QwenVision
from models.backbones.text_tower import Text
from models.backbones.vit import ViT
from models.backbones.vlm import VLM
from models.checkpoints import files, gguf, timm, transformers, transformers_vlm
from models.checkpoints.compressors import reader_shapes, shapes_of
from models.checkpoints.layout import BLOCKS, Layout, Leaf, Shape, flatten, leaves, nest
from models.checkpoints.positions import RESAMPLINGS
from models.storage import STORAGES
from ops import choices

SOURCES = (timm, transformers, transformers_vlm)
Model = ViT | Text | Bert | Clip | LM | QwenVision | VLM
AnyModel = TypeVar('AnyModel', bound=Model)
Params = dict[str, Any]


def load(model: Model, source: str | pathlib.Path, *, fresh: Sequence[str] = (),
         unused: Sequence[str] = (), dtype: DTypeLike | None = np.float32, storage: str = 'stacked',
         shardings: Any = None) -> Params:
  """Reads a checkpoint into the tree of a model; the layout is found by its names.

  Args:
    model: its plan does not matter: reductions have no part in foreign checkpoints.
    source: a .safetensors or .gguf file, a folder with a former (or with shards and their index),
      or a name on the hub as 'owner/name'.
    fresh: paths in our tree to leave out, as ('head',): the caller makes them (`merge_params`).
    unused: patterns of names in the checkpoint to leave out, as ('head.*',).
    dtype: of the result; None keeps the stored ones, of which float64 is the host's alone: JAX
      makes float32 of it.
    storage: of the blocks: 'stacked' [L, ...], or 'unstacked', a tuple of L trees
      (models/storage.py).
    shardings: a tree as the result (lib/runtime/sharding.py, `make_shardings`): every array is then
      made where it belongs, device by device, and never lies on the host as a whole.

  Returns:
    A tree of numpy arrays, with shardings of jax arrays, without the fresh leaves.

  Raises:
    ValueError: nothing there, a pickle, a config.json that says what is not known here or another
      model, another model's tensors, quantized ones, NaN or infinity in one that is read, a head
      where the model ties it to other embeddings, or tensors that do not fit; one line with what is
      missing, what is left over and which shapes differ.
  """
  choices.check('storage=', storage, STORAGES)
  path = files.locate(source)
  whole = _shapes(model)
  shapes = {name: shape for name, shape in whole.items() if not _under(name, fresh)}
  with _reading(path) as tensors:
    layout, prefix = _choose(model, source, shapes, tensors)
    heads = _stored_heads(tensors, unused)
    config = gguf.config(path) if path.suffix == gguf.SUFFIX else files.config(path)
    if layout.name.startswith('transformers'):
      transformers.check_config(model, config, own_head=bool(heads))
    else:
      timm.check_config(model, config)
    for head in _other_heads(model, layout, prefix, tensors, heads):
      raise ValueError(f'{head} of {source} differs from the embeddings, to which the model ties '
                       'its head: build it with tied=False, or as '
                       'models.checkpoints.tied_as_stored does')
    wanted = list(leaves(layout, prefix, shapes))
    left_out = [name for leaf in _possible(layout, prefix, whole, fresh)
                for name in leaf.names]
    _check(model, source, layout, wanted, tensors, {*left_out}, (*unused, *layout.ignorable))
    flat: dict[str, Any] = {}
    sharding_of = None if shardings is None else flatten(_keyed(shardings))
    for where, parts in _grouped(wanted, storage).items():
      read = functools.partial(_read, tensors, dtype, parts)
      shape = (len(parts), *parts[0].shape) if parts[0].stacked else parts[0].shape
      if sharding_of is None:
        flat[where] = read((slice(None),) * len(shape))
      else:
        flat[where] = jax.make_array_from_callback(shape, sharding_of[where], read)
  return _tupled(nest(flat))


def tied_as_stored(model: AnyModel, source: str | pathlib.Path) -> AnyModel:
  """Returns the model with a head of its own where a checkpoint holds one that differs.

  A config.json may say that the head is tied to the embeddings beside a head that is not: after
  fine-tuning, or where a default was written. The tensors decide.

  Args:
    model: as `from_config` makes it; models other than LM and VLM are returned as they are.
    source: as in `load`.

  Raises:
    ValueError: as `load`, if the checkpoint cannot be opened or is another model's.
  """
  lm = model.lm if isinstance(model, VLM) else model
  if not isinstance(lm, LM) or not lm.tied:
    return model
  with _reading(files.locate(source)) as tensors:
    layout, prefix = _choose(model, source, _shapes(model), tensors)
    if not any(_other_heads(model, layout, prefix, tensors, _stored_heads(tensors))):
      return model
  untied = lm.clone(tied=False)
  return cast(AnyModel, model.clone(lm=untied) if isinstance(model, VLM) else untied)


def _reading(path: pathlib.Path) -> contextlib.AbstractContextManager[Any]:
  """Opens a checkpoint of any format that is read."""
  if path.suffix == gguf.SUFFIX:
    return gguf.reading(path)
  return files.reading(files.tensor_files(path))


def _stored_heads(tensors: files.Tensors, unused: Sequence[str] = ()) -> list[str]:
  """Names of the heads that a checkpoint of a language model holds, beside those left out."""
  return [name for name in tensors.shapes if name.endswith('lm_head.weight')
          and not any(fnmatch.fnmatchcase(name, pattern) for pattern in unused)]


def _other_heads(model: Model, layout: Layout, prefix: str, tensors: files.Tensors,
                 heads: Sequence[str]) -> Iterator[str]:
  """Yields those heads that are not the embeddings to which a model ties its own."""
  lm = model.lm if isinstance(model, VLM) else model
  if not isinstance(lm, LM) or not lm.tied:
    return
  path = 'lm/table' if isinstance(model, VLM) else 'table'
  leaf, = leaves(layout, prefix, {path: (lm.vocabulary, lm.width)})
  table, = leaf.names
  for head in heads:
    if table in tensors.shapes and not np.array_equal(tensors.read(head), tensors.read(table)):
      yield head


def _grouped(wanted: Sequence[Leaf], storage: str) -> dict[str, list[Leaf]]:
  """The leaves of the result by path, each with the parts that it is made of."""
  groups: dict[str, list[Leaf]] = {}
  for leaf in wanted:
    where = leaf.path
    if storage == 'unstacked' and leaf.layer is not None:
      where = where.replace(BLOCKS, f'{BLOCKS}{leaf.layer}/')
      leaf = dataclasses.replace(leaf, layer=None)
    groups.setdefault(where, []).append(leaf)
  return groups


def _read(tensors: files.Tensors, dtype: DTypeLike | None, parts: list[Leaf],
          index: tuple[slice, ...]) -> np.ndarray:
  """A region of one leaf of the result, from one tensor of the checkpoint at a time."""
  def one(leaf: Leaf, region: tuple[slice, ...]) -> np.ndarray:
    return leaf.inward([tensors.read(name) for name in leaf.names])[region]

  if not parts[0].stacked:
    array = one(parts[0], index)
    return np.asarray(array if dtype is None else array.astype(dtype), order='C')
  stacked = None
  for i, leaf in enumerate(chosen := parts[index[0]]):
    array = one(leaf, index[1:])
    if stacked is None:
      stacked = np.empty((len(chosen), *array.shape), array.dtype if dtype is None else dtype)
    stacked[i] = array
  return cast(np.ndarray, stacked)


def _keyed(tree: Any) -> Any:
  """Tuples of a tree as dicts with keys '0', '1', …"""
  if isinstance(tree, Mapping):
    return {key: _keyed(value) for key, value in tree.items()}
  if isinstance(tree, tuple):
    return {str(i): _keyed(value) for i, value in enumerate(tree)}
  return tree


def _tupled(tree: Any) -> Any:
  """The other way, for blocks."""
  if not isinstance(tree, Mapping):
    return tree
  if tree and all(key.isdigit() for key in tree):
    return tuple(_tupled(tree[str(i)]) for i in range(len(tree)))
  return {key: _tupled(value) for key, value in tree.items()}


def save(model: Model, params: Params, path: str | pathlib.Path, *,
         layout: str) -> None:
  """Writes a tree as one safetensors file that the other library reads.

  Args:
    model: the params' own.
    params: blocks stacked.
    path: of the file.
    layout: 'timm', or 'transformers/' and vit, dinov2, clip, siglip, siglip2,
      lm, vlm or vlm4 (as it was saved before version 5).

  Raises:
    ValueError: an unknown layout, one that has no place for some leaf, or a tree that is not the
      model's.
  """
  by_name = {candidate.name: candidate for source in SOURCES for candidate in source.layouts(model)}
  if layout not in by_name:
    raise ValueError(f'layout {layout!r} does not hold a {type(model).__name__}: choose one of '
                     f'{", ".join(by_name)}')
  chosen, flat = by_name[layout], flatten(params)
  shapes = {name: tuple(np.shape(value)) for name, value in flat.items()}
  if shapes != _shapes(model):
    raise ValueError(f'these parameters are not those of the model: they lack '
                     f'{_listed(_shapes(model).keys() - shapes.keys())}, have '
                     f'{_listed(shapes.keys() - _shapes(model).keys())} more, or differ in shape')
  tensors: dict[str, np.ndarray] = {}
  try:
    for leaf in leaves(chosen, chosen.prefixes[0], shapes):
      array = flat[leaf.path] if leaf.layer is None else flat[leaf.path][leaf.layer]
      pieces = leaf.outward(np.asarray(array), _side(model))
      tensors |= dict(zip(leaf.names, pieces, strict=True))
  except LookupError as error:
    raise ValueError(f'layout {layout!r} has no place for {error.args[0]}: choose one of '
                     f'{", ".join(by_name)}') from error
  save_file(tensors, path)


def merge_params(params: Params, loaded: Params) -> Params:
  """`params` with the values of every leaf that `loaded` has, in its own dtypes and places.

  Args:
    params: arrays, or ShapeDtypeStructs with shardings; what `loaded` lacks stays as it is.
    loaded: host arrays, the same in every process.
  """
  flat = flatten(params)

  def placed(leaf: jax.Array, array: np.ndarray) -> jax.Array:
    array = np.asarray(array, leaf.dtype)
    return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: array[index])

  return nest({**flat, **{path: placed(flat[path], array)
                          for path, array in flatten(loaded).items()}})


def resize_positions(params: Params, model: ViT, *,
                     image_size: int | tuple[int, int]) -> Params:
  """A tree for images of another size: position embeddings resampled on the new grid of patches.

  Resampled as `model.position_resampling` says (models/checkpoints/positions.py); positions of
  special tokens stay. Within 1e-5 of what timm does, and of ViT, DeiT, MAE, DINOv2 with and without
  registers, CLIP, SigLIP and SigLIP 2 in the transformers library.

  Args:
    params: of `model`.
    model: as it was loaded; give the tree to `model.clone(image_size=image_size)`.
    image_size: new side of the images in pixels, or (height, width).

  Raises:
    ValueError: no learned positions, an unknown resampling, or a size that is no multiple of the
      patch.
  """
  if model.positions != 'learned':
    raise ValueError(f'positions={model.positions!r} are computed, not stored: nothing to resize')
  new = model.clone(image_size=image_size)
  if any(side % model.patch for side in new.input_shape[:2]):
    raise ValueError(f'image_size={image_size} is not a multiple of patch={model.patch}: change '
                     'it')
  choices.check('position_resampling=', model.position_resampling, RESAMPLINGS)
  resample = RESAMPLINGS[model.position_resampling]
  table = np.asarray(params['pos'], np.float32)
  lead, patches = np.split(table, [table.shape[1] - model.grid[0] * model.grid[1]], axis=1)
  patches = resample(patches.reshape(*model.grid, -1), new.grid)
  patches = patches.reshape(1, new.grid[0] * new.grid[1], -1)
  return {**params, 'pos': np.concatenate([lead, patches], axis=1)}


def _shapes(model: Model) -> dict[str, Shape]:
  """Shapes of a model's own leaves by path, those of learned reductions left out."""
  if isinstance(model, Clip):
    towers: dict[str, ViT | Text] = {'image': model.image, 'text': model.text}
    scalars: dict[str, Shape] = {
        'logit_scale': (), **({'logit_bias': ()} if model.bias else {})}
    return scalars | {f'{name}/{path}': shape for name, tower in towers.items()
                      for path, shape in _shapes(tower).items()}
  if isinstance(model, VLM):
    return _shapes_of_vlm(model)
  return _traced_shapes(model.clone(plan=None, mesh=None, implementation='xla'))


@functools.lru_cache(maxsize=64)
def _traced_shapes(model: ViT | Text | LM | QwenVision) -> dict[str, Shape]:
  """Shapes of one tower's leaves, traced once: loading asks for them several times."""
  if isinstance(model, LM):
    example = jnp.zeros((1, 1), jnp.int32)
  elif isinstance(model, QwenVision):
    return {path: tuple(leaf.shape) for path, leaf in flatten(_qwen_tree(model)).items()}
  elif isinstance(model, Text | Bert):
    example = jnp.zeros((1, model.context), jnp.int32)
  else:
    example = jnp.zeros((1, *model.input_shape))
  tree = jax.eval_shape(model.init, jax.random.key(0), example)['params']
  return {path: tuple(leaf.shape) for path, leaf in flatten(tree).items()}


def _qwen_tree(model: QwenVision) -> Any:
  patches = jax.ShapeDtypeStruct((1, *model.grid, model.numbers), jnp.float32)
  sizes = jax.ShapeDtypeStruct((1, 2), jnp.int32)
  return jax.eval_shape(model.init, jax.random.key(0), patches, sizes)['params']


def _shapes_of_vlm(model: VLM) -> dict[str, Shape]:
  parts = {'tower': _shapes(model.tower), 'lm': _shapes(model.lm)}
  shapes = {f'{name}/{path}': shape for name, part in parts.items() for path, shape in part.items()}
  wide, narrow = model.lm.width, model.tower.width * model.side ** 2
  if model.compressor:
    own = shapes_of(model.compressor, model.tower.grid, model.tower.width)
    shapes |= {f'compressor/{path}': shape for path, shape in own.items()}
  if model.compressor and model.lm.reader:
    own = reader_shapes(model.compressor, model.lm.reader, model.tower.grid, model.tower.width)
    shapes |= {f'lm/reader/{path}': shape for path, shape in own.items()}
  if model.projection:
    shapes |= {'projector/fc1/kernel': (narrow, wide), 'projector/fc1/bias': (wide,),
              'projector/fc2/kernel': (wide, wide), 'projector/fc2/bias': (wide,)}
    if model.side > 1:
      shapes |= {'projector/norm/scale': (narrow,), 'projector/norm/bias': (narrow,)}
  return shapes | ({'newline': (wide,)} if model.newline else {})


def _side(model: Model) -> int:
  if isinstance(model, Text | Bert | LM):
    return 0
  if isinstance(model, VLM):
    return model.tower.patch
  return (model.image if isinstance(model, Clip) else model).patch


def _under(path: str, starts: Sequence[str]) -> bool:
  return any(path == start or path.startswith(f'{start}/') for start in starts)


def _possible(layout: Layout, prefix: str, shapes: Mapping[str, Shape],
              fresh: Sequence[str]) -> list[Leaf]:
  """The fresh leaves that a layout has names for."""
  possible: list[Leaf] = []
  for path, shape in shapes.items():
    if _under(path, fresh):
      try:
        possible += leaves(layout, prefix, {path: shape})
      except LookupError:
        continue
  return possible


def _choose(model: Model, source: str | pathlib.Path, shapes: Mapping[str, Shape],
            tensors: files.Tensors) -> tuple[Layout, str]:
  """The layout and prefix under which most names, and then most shapes, are found."""
  best, most = None, (0, 0)
  tried = []
  for source_module in SOURCES:
    for layout in source_module.layouts(model):
      for prefix in layout.prefixes:
        try:
          wanted = list(leaves(layout, prefix, shapes))
        except LookupError:
          continue
        tried.append((layout.name, [name for leaf in wanted for name in leaf.names]))
        pairs = [(name, leaf.foreign_shape(shape, _side(model))) for leaf in wanted
                 for name, shape in zip(leaf.names, leaf.part_shapes, strict=True)]
        score = (sum(name in tensors.shapes for name, _ in pairs),
                 sum(tensors.shapes.get(name) == shape for name, shape in pairs))
        if score > most:
          best, most = (layout, prefix), score
  if best is None:
    name, names = tried[0] if tried else ('no layout has all of it', list(shapes))
    raise ValueError(f'{source} holds another model: none of its {len(tensors.shapes)} tensors '
                     f'({_listed(tensors.shapes)}) is one of this {type(model).__name__}, which '
                     f'has, as {name}, {_listed(names)} (layouts tried: '
                     f'{", ".join(dict.fromkeys(layout for layout, _ in tried)) or "none"})')
  return best


def _check(model: Model, source: str | pathlib.Path, layout: Layout, wanted: list[Leaf],
           tensors: files.Tensors, left_out: set[str], unused: Sequence[str]) -> None:
  """Raises with everything that does not fit."""
  expected = {name: (leaf, leaf.foreign_shape(shape, _side(model))) for leaf in wanted
           for name, shape in zip(leaf.names, leaf.part_shapes, strict=True)}
  missing = [name for name in expected if name not in tensors.shapes]
  extra = [name for name in tensors.shapes if name not in expected and name not in left_out
           and not any(fnmatch.fnmatchcase(name, pattern) for pattern in unused)]
  for name in tensors.shapes.keys() & {*expected, *extra}:
    tensors.check_dtype(name)
  if missing or extra:
    raise ValueError(f'{source} does not fit this {type(model).__name__} as {layout.name}: it '
                     f'lacks {_listed(missing)}, and has {_listed(extra)} that the model does not; '
                     'build the model that it holds, or name what to start anew in fresh=(...) and '
                     'what to leave out in unused=(...)')
  for name, (leaf, shape) in expected.items():
    stored_shape = tensors.shapes[name]
    if stored_shape == shape:
      continue
    if leaf.path.endswith('pos') and stored_shape[-1] == shape[-1]:
      raise ValueError(f'{name} of {source} is for {stored_shape[-2]} positions and the model has '
                       f'{shape[-2]}: load it at its own image_size, and resize with '
                       'models.checkpoints.resize_positions (config.model.weights_image_size does '
                       'both)')
    hint = "; to start the classifier anew, fresh=('head',)" if 'head' in leaf.path else ''
    raise ValueError(f'{name} of {source} has shape {stored_shape} and the model wants {shape} for '
                     f'{leaf.path}{hint}')


def _listed(names: Iterable[str]) -> str:
  """All names in one line, those of blocks once, with how many there are."""
  counts = collections.Counter(re.sub(r'\.\d+\.', '.*.', name) for name in names)
  return ', '.join(name if count == 1 else f'{name} ({count} times)'
                   for name, count in sorted(counts.items())) or 'nothing'

