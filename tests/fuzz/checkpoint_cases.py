"""Checkpoints as no release has them: config.json with impossible values, and damaged weights."""

from __future__ import annotations

import functools
import json
import pathlib
import random
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from fuzz.case import (
  BAD,
  DAMAGE,
  JSON_DAMAGE,
  Case,
  Damage,
  bad_values,
  changed,
  copied,
  flipped,
  once,
  shown,
  some_bad_values,
  write_json,
)

LANGUAGE = ('llama2', 'llama3', 'mistral', 'qwen2', 'qwen2_yarn', 'qwen3')
VISION_LANGUAGE = ('llava', 'llava_next', 'llava_onevision', 'qwen2_vl', 'qwen2_5_vl')
VISION = ('hub_vit', 'hub_deit_distilled', 'hub_dinov2_reg4_swiglu', 'hub_mae', 'hub_clip',
          'hub_siglip', 'hub_siglip2')
# Keys that say nothing of the model: where a file comes from, training, classes, generation, and
# parts of the model that are not read.
SAYS_NOTHING = {
    'architectures', 'dtype', 'torch_dtype', 'transformers_version', 'use_cache',
    'attention_dropout', 'dropout', 'hidden_dropout_prob', 'attention_probs_dropout_prob',
    'drop_path_rate', 'initializer_range', 'initializer_factor', 'logit_scale_init_value',
    'layerscale_value', 'use_mask_token', 'norm_pix_loss', 'mask_ratio', 'id2label', 'label2id',
    'bos_token_id', 'eos_token_id', 'pad_token_id', 'pretraining_tp', 'pooler_act',
    'pooler_output_size', 'encoder_stride', 'decoder_hidden_size', 'decoder_intermediate_size',
    'decoder_num_attention_heads', 'decoder_num_hidden_layers', 'out_features', 'out_indices',
    'stage_names', 'apply_layernorm', 'reshape_hidden_states'}
# Inside, the name of an architecture that the whole one settles.
FINE: dict[str, tuple[Any, ...]] = {'model_type': ('no such thing',)}


def language_model(name: str, folder: pathlib.Path) -> pathlib.Path:
  """Writes a tiny checkpoint with its tokenizer; returns its folder."""
  from helpers import assistants
  return assistants.checkpoint(folder / name, name)


def load(folder: pathlib.Path) -> Any:
  """Loads a language model, or a vision-language model."""
  from lib import assistant
  return assistant.load(folder)


def load_image_model(folder: pathlib.Path) -> Any:
  """Loads a vision transformer, or a pair with a text tower."""
  from models import checkpoints
  from models.checkpoints import files, vit_config
  return checkpoints.load(vit_config.from_config(files.config(folder)), folder)


def with_config(name: str, config: Any, folder: pathlib.Path, shared: pathlib.Path) -> None:
  """Loads a tiny checkpoint under another config.json."""
  if name in VISION:
    from helpers import parity
    shutil.copy(parity.FOLDER / f'{name}.safetensors', folder / 'model.safetensors')
    write_json(folder / 'config.json', config)
    load_image_model(folder)
  else:
    source = once(shared / f'folder_{name}', functools.partial(language_model, name)) / name
    place = copied(source, folder)
    write_json(place / 'config.json', config)
    load(place)


def config_of(name: str) -> dict[str, Any]:
  """Returns the config.json of a tiny checkpoint."""
  from helpers import parity, parity_lm, parity_vlm
  if name in VISION:
    config = parity.case(name)['config']
    # The fixture says more than the family's files do.
    vision = {key: value for key, value in config.get('vision_config', {}).items()
              if name != 'hub_siglip2' or key != 'image_size'}
    return {**config, 'vision_config': vision} if vision else config
  return parity_vlm.config_of(name) if name in VISION_LANGUAGE else parity_lm.config(name)


def published() -> Iterator[Case]:
  """Yields cases of config.json: keys of other values, of no value, and too many."""
  rng = random.Random(1)
  for name in (*LANGUAGE, *VISION_LANGUAGE, *VISION):
    config = config_of(name)
    yield Case(name, functools.partial(with_config, name, config), fine=True)
    for path, value in some_bad_values(config, rng):
      key = path[-1]
      fine = len(path) > 1 and value in FINE.get(key, ())
      if not (set(path) & SAYS_NOTHING or fine):
        yield Case(f'{name}: {".".join(path)}={shown(value)}',
                   functools.partial(with_config, name, changed(config, path, value)),
                   says=(key, 'config.json', 'shape'))
    for part in ('text_config', 'vision_config', 'rope_parameters', 'rope_scaling'):
      if part in config:
        value = rng.choice(BAD[dict])
        yield Case(f'{name}: {part}={shown(value)}',
                   functools.partial(with_config, name, {**config, part: value}),
                   says=(part, 'config.json'))
    for key in ('model_type', 'hidden_size', 'num_hidden_layers', 'vocab_size', 'image_size',
                'patch_size'):
      if (key in config and key != 'model_type') or (key == 'model_type' and name not in VISION):
        less = {other: value for other, value in config.items() if other != key}
        yield Case(f'{name}: no {key}', functools.partial(with_config, name, less))
    odd = rng.choice(['rope_type', 'use_rope', 'num_experts', 'attention_sinks', 'logit_softcap'])
    yield Case(f'{name}: {odd}', functools.partial(with_config, name, {**config, odd: 'abc'}),
               says=(odd,))
    for other in rng.sample(['gpt2', 'vit', 'llama', 'qwen3', 'clip', 'dinov2'], 2):
      if other != config.get('model_type'):
        yield Case(f'{name}: model_type={other}',
                   functools.partial(with_config, name, {**config, 'model_type': other}))
  rng = random.Random(2)
  for how, damage in (DAMAGE | JSON_DAMAGE).items():
    yield Case(f'config.json: {how}', functools.partial(
        damaged, 'llava', 'config.json', damage, rng.random(), load), says=('config.json',))


# Weights.


def damaged(name: str, file: str, damage: Damage, seed: float,
            read: Callable[[pathlib.Path], Any], folder: pathlib.Path,
            shared: pathlib.Path) -> None:
  """Reads a tiny checkpoint, one of whose files is damaged."""
  source = once(shared / f'folder_{name}', functools.partial(language_model, name)) / name
  place = copied(source, folder)
  damage(place / file, random.Random(seed))
  read(place)


def header_flipped(path: pathlib.Path, rng: random.Random) -> None:
  """Turns a bit of what a safetensors file says of its tensors, not of its own metadata."""
  size = 8 + int.from_bytes(path.read_bytes()[:8], 'little')
  flipped(path, rng, size)


def rewritten(change: Callable[[dict[str, np.ndarray], random.Random], Any]) -> Callable[..., None]:
  """Returns the damage that changes the tensors of a file."""
  def damage(path: pathlib.Path, rng: random.Random) -> None:
    from safetensors.numpy import load_file, save_file
    tensors = load_file(path)
    change(tensors, rng)
    save_file(tensors, path)
  return damage


def one(tensors: dict[str, np.ndarray], rng: random.Random) -> str:
  """Returns the name of some tensor."""
  return rng.choice(sorted(tensors))


def filled(value: float) -> Callable[[dict[str, np.ndarray], random.Random], None]:
  """Returns the change that fills a tensor."""
  def change(tensors: dict[str, np.ndarray], rng: random.Random) -> None:
    name = one(tensors, rng)
    tensors[name] = np.full_like(tensors[name], value)
  return change


def cast(dtype: str) -> Callable[[dict[str, np.ndarray], random.Random], None]:
  """Returns the change that stores a tensor as another type."""
  def change(tensors: dict[str, np.ndarray], rng: random.Random) -> None:
    name = one(tensors, rng)
    tensors[name] = tensors[name].astype(dtype)
  return change


def lacking(tensors: dict[str, np.ndarray], rng: random.Random) -> None:
  """Leaves a tensor out."""
  del tensors[one(tensors, rng)]


def wider(tensors: dict[str, np.ndarray], rng: random.Random) -> None:
  """Makes a tensor longer."""
  name = one(tensors, rng)
  tensors[name] = np.concatenate([tensors[name]] * 2)


def turned(tensors: dict[str, np.ndarray], rng: random.Random) -> None:
  """Turns an oblong matrix."""
  name = rng.choice(sorted(name for name, tensor in tensors.items()
                           if tensor.ndim == 2 and len(set(tensor.shape)) == 2))
  tensors[name] = np.ascontiguousarray(tensors[name].T)


def more(tensors: dict[str, np.ndarray], rng: random.Random) -> None:
  """Adds a tensor that belongs to nothing."""
  tensors[f'{one(tensors, rng)}_2'] = np.zeros((2, 2), np.float32)


def renamed(tensors: dict[str, np.ndarray], rng: random.Random) -> None:
  """Gives a tensor another name."""
  name = one(tensors, rng)
  tensors[name.replace('.', '_')] = tensors.pop(name)


def emptied(tensors: dict[str, np.ndarray], rng: random.Random) -> None:
  """Leaves all tensors out."""
  del rng
  tensors.clear()


CHANGES = {
    'NaN': filled(float('nan')), 'infinity': filled(float('inf')), 'int8': cast('int8'),
    'int64': cast('int64'), 'bool': cast('bool'), 'one less': lacking, 'one more': more,
    'longer': wider, 'turned': turned, 'renamed': renamed, 'none': emptied}


def change_index(change: Callable[[dict[str, Any]], Any], folder: pathlib.Path,
                 shared: pathlib.Path) -> None:
  """Reads a checkpoint in several files whose index is changed."""
  from helpers import parity_lm

  from models import checkpoints
  from models.checkpoints import files
  from models.checkpoints.lm_config import from_config
  place = copied(once(shared / 'shards', parity_lm.sharded), folder)
  index = json.loads((place / files.INDEX).read_text())
  write_json(place / files.INDEX, change(index))
  checkpoints.load(from_config(parity_lm.config(parity_lm.NAME)), place)


def damage_index(damage: Damage, folder: pathlib.Path,
                 shared: pathlib.Path) -> None:
  """Reads a checkpoint in several files whose index is damaged."""
  from helpers import parity_lm

  from models import checkpoints
  from models.checkpoints import files
  from models.checkpoints.lm_config import from_config
  place = copied(once(shared / 'shards', parity_lm.sharded), folder)
  damage(place / files.INDEX, random.Random(0))
  checkpoints.load(from_config(parity_lm.config(parity_lm.NAME)), place)


def _places(change: Callable[[dict[str, Any], str], Any]) -> Callable[[dict[str, Any]], Any]:
  """Returns a change of where an index says that its first tensor is."""
  def changed_index(index: dict[str, Any]) -> dict[str, Any]:
    places = dict(index['weight_map'])
    change(places, min(places))
    return {**index, 'weight_map': places}
  return changed_index


INDEX_CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    'no map': lambda index: {}, 'map of text': lambda index: {'weight_map': 'abc'},
    'map of lists': lambda index: {'weight_map': [['a', 'b']]},
    'empty map': lambda index: {'weight_map': {}},
    **{f'file {shown(file)}': _places(lambda places, name, file=file: places.update({name: file}))
       for file in (None, 3, [], {}, '', '.', '..', '../model.safetensors', '/etc/passwd', 'none',
                    'a\0b', 'x' * 300, 'model-00002-of-00003.safetensors')},
    'one more': _places(lambda places, name: places.update({'abc': places[name]}))}


def weights() -> Iterator[Case]:
  """Yields cases of safetensors files and their index."""
  for name in ('llava', 'qwen3'):
    of = functools.partial(damaged, name, 'model.safetensors')
    yield Case(name, functools.partial(of, lambda path, rng: None, 0, load), fine=True)
    for seed in range(6):
      yield Case(f'{name}: truncated, {seed}',
                 functools.partial(of, DAMAGE['truncated'], seed, load))
    for seed in range(20):
      yield Case(f'{name}: bit of the header, {seed}',
                 functools.partial(of, header_flipped, seed, load))
    for how, damage in DAMAGE.items():
      yield Case(f'{name}: {how}', functools.partial(of, damage, 7, load),
                 says=('model.safetensors', 'has no', 'there is no'))
    for how, change in CHANGES.items():
      for seed in range(2):
        yield Case(f'{name}: {how}, {seed}', functools.partial(of, rewritten(change), seed, load))
  yield Case('index', functools.partial(change_index, lambda index: index), fine=True)
  for how, change in INDEX_CHANGES.items():
    yield Case(f'index: {how}', functools.partial(change_index, change))
  for how, damage in (DAMAGE | JSON_DAMAGE).items():
    yield Case(f'index: {how}', functools.partial(damage_index, damage), says=('index.json',))


# Runs: checkpoints of training, and what tools/pack.py wrote.


def tree() -> dict[str, Any]:
  """Returns small parameters."""
  import jax.numpy as jnp
  return {'blocks': {'kernel': jnp.arange(60.0).reshape(3, 4, 5), 'bias': jnp.ones(5)},
          'cls': jnp.zeros((1, 4))}


def save_run(folder: pathlib.Path) -> None:
  """Saves a checkpoint of training."""
  from lib.runtime.checkpoint import Checkpoints
  checkpoints = Checkpoints(folder / 'checkpoints')
  checkpoints.save(1, {'state': tree(), 'ema': tree()}, {'place': 1}, metrics={'accuracy': 0.5})
  checkpoints.close()


def restore(where: float, damage: Damage, seed: int,
            folder: pathlib.Path, shared: pathlib.Path) -> None:
  """Goes on from a checkpoint, one of whose files is damaged; `where` is in [0, 1)."""
  import jax

  from lib.runtime.checkpoint import Checkpoints
  place = copied(once(shared / 'run', save_run), folder) / 'checkpoints'
  files = sorted(path for path in (place / '1').rglob('*') if path.is_file())
  damage(files[int(where * len(files))], random.Random(seed))
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  shapes = jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), tree())
  checkpoints = Checkpoints(place)
  try:
    checkpoints.restore({'state': shapes, 'ema': shapes})
  finally:
    checkpoints.close()


def pack_run(folder: pathlib.Path) -> None:
  """Copies a packed run of the project's results."""
  source = pathlib.Path(__file__).parents[2] / 'results' / 'stdlib_needle'
  for name in ('config.json', 'info.json', 'model.safetensors', 'SHA256SUMS'):
    shutil.copy(source / name, folder)


def load_packed(file: str, damage: Damage, seed: int,
                folder: pathlib.Path, shared: pathlib.Path) -> None:
  """Loads a packed run, one of whose files is damaged."""
  from lib.tasks.trained import load_run
  place = copied(once(shared / 'packed', pack_run), folder)
  damage(place / file, random.Random(seed))
  load_run(place)


def with_keys(file: str, change: dict[str, Any], folder: pathlib.Path,
              shared: pathlib.Path) -> None:
  """Loads a packed run without checksums, in one of whose files keys are changed."""
  from lib import notebook
  place = copied(once(shared / 'packed', pack_run), folder)
  (place / 'SHA256SUMS').unlink()
  write_json(place / file, json.loads((place / file).read_text()) | change)
  notebook.load(place)


def saved_runs() -> Iterator[Case]:
  """Yields cases of checkpoints of training and of packed runs."""
  def nothing(path: pathlib.Path, rng: random.Random) -> None:
    del path, rng

  rng = random.Random(3)
  yield Case('checkpoint', functools.partial(restore, 0, nothing, 0), fine=True)
  for seed in range(20):
    yield Case(f'checkpoint: bit, {seed}', functools.partial(restore, rng.random(), flipped, seed))
  for how, damage in DAMAGE.items():
    for seed in range(2):
      yield Case(f'checkpoint: {how}, {seed}',
                 functools.partial(restore, rng.random(), damage, seed))
  yield Case('packed', functools.partial(load_packed, 'config.json', nothing, 0), fine=True)
  for seed in range(6):
    yield Case(f'packed: bit, {seed}',
               functools.partial(load_packed, 'model.safetensors', flipped, seed))
  for file in ('model.safetensors', 'config.json', 'info.json'):
    for how in ('truncated', 'empty', 'folder', 'pipe', 'web page'):
      yield Case(f'packed: {file} {how}', functools.partial(load_packed, file, DAMAGE[how], 0),
                 says=(file,))
  # As from a stranger, who sums up what he likes.
  source = pathlib.Path(__file__).parents[2] / 'results' / 'stdlib_needle'
  for file in ('config.json', 'info.json'):
    content = json.loads((source / file).read_text())
    yield Case(f'{file} of a run', functools.partial(with_keys, file, {}), fine=True)
    for path, value in bad_values(content):
      # Nothing reads a set, what it began from, or the layers of a place without a method.
      if path[0] in ('mesh', 'start') or (path[-1], value) == ('layers', 5) or (
          path[0] == 'data' and isinstance(value, str)):
        continue
      top = changed(content, path, value)[path[0]]
      yield Case(f'{file} of a run: {".".join(path)}={shown(value)}', functools.partial(
          with_keys, file, {path[0]: top}), says=(path[-1], file))


KINDS = {'published configs': published, 'weights': weights, 'saved runs': saved_runs}
