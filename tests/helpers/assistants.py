"""Folders with tiny models to talk to: checkpoints of golden/, and runs that were never trained."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from helpers import parity_lm, parity_vlm
from lib.data import qa as qa_data
from lib.data.datasets import digit_scenes, stdlib_needle
from lib.data.prepare import prepare
from lib.runtime.checkpoint import Checkpoints
from lib.tasks import image as image_task
from lib.tasks import qa as qa_task
from models.build import build

CHAT = parity_vlm.FOLDER / 'chat'
STEPS = json.loads((parity_vlm.FOLDER / 'preprocess.json').read_text())
STEPS_OF = {'llava': 'llava_pad', 'llava_next': 'llava_next',
            'llava_onevision': 'llava_onevision', 'qwen2_vl': 'qwen2_vl', 'qwen2_5_vl': 'qwen2_vl'}
END = 2


def tokenizer(folder, size, image=None, template=True):
  """A tokenizer of words w0, w1, …, with the special tokens of a model of so many ids."""
  made = json.loads((CHAT / 'tokenizer.json').read_text())
  special = {0: '<unk>', 1: '<s>', END: '</s>'} | ({image: '<image>'} if image else {})
  made['added_tokens'] = [
      {'id': number, 'content': word, 'single_word': False, 'lstrip': False, 'rstrip': False,
       'normalized': False, 'special': True} for number, word in special.items()]
  made['model']['vocab'] = {special.get(number, f'w{number}'): number for number in range(size)}
  made['decoder'] = None
  (folder / 'tokenizer.json').write_text(json.dumps(made))
  (folder / 'generation_config.json').write_text(json.dumps({'eos_token_id': [END]}))
  if template:
    shutil.copy(CHAT / 'tokenizer_config.json', folder)
    shutil.copy(CHAT / 'chat_template.jinja', folder)
  return folder


def checkpoint(folder, name, **changes):
  """A checkpoint's folder: a language model of parity_lm, or a family of parity_vlm."""
  sees = name in parity_vlm.FAMILIES
  source = (parity_vlm if sees else parity_lm).FOLDER
  config = json.loads((source / f'{name}.json').read_text()) | changes
  folder.mkdir(exist_ok=True)
  (folder / 'config.json').write_text(json.dumps(config))
  shutil.copy(source / f'{name}.safetensors', folder / 'model.safetensors')
  if sees:
    (folder / 'preprocessor_config.json').write_text(json.dumps(STEPS[STEPS_OF[name]]))
  size = (config.get('text_config') or config)['vocab_size']
  return tokenizer(folder, size, parity_vlm.image_token(name) if sees else None)


def sets(folder):
  """Prepares two examples of a split of each set of questions; returns the folder."""
  with pytest.MonkeyPatch.context() as patch:
    for builder in (digit_scenes.DigitScenes, stdlib_needle.StdlibNeedle):
      short = [dataclasses.replace(config, train=2, test=2)
               for config in builder.BUILDER_CONFIGS[:1]]
      patch.setattr(builder, 'BUILDER_CONFIGS', short)
      patch.setattr(builder, 'builder_configs', {config.name: config for config in short})
    for name in ('digit_scenes/64', 'stdlib_needle/64'):
      prepare(name, data_dir=str(folder))
  return folder


def run(folder, config, data_dir, **reduce):
  """A run's workdir with fresh parameters, those of the config's reductions included."""
  config = ml_collections.ConfigDict(config)
  config.data.data_dir = str(data_dir)
  with config.unlocked():
    for place, given in reduce.items():
      config.reduce[place].update(given)
  folder.mkdir(exist_ok=True)
  (folder / 'config.json').write_text(config.to_json_best_effort())
  info = qa_data.info(config.data)
  model = qa_task.build(config.model, config.reduce, info, context=config.data.context)
  random = np.random.default_rng(0)
  params = jax.tree.map(
      lambda leaf: jnp.asarray(0.3 * random.normal(size=leaf.shape), leaf.dtype),
      jax.eval_shape(functools.partial(qa_task.init, model, info, config.data.context),
                     jax.random.key(0)))
  checkpoints = Checkpoints(folder / 'checkpoints')
  for step, ema in ((1, jax.tree.map(jnp.zeros_like, params)), (2, params)):
    checkpoints.save(step, {'state': {'step': jnp.asarray(step)}, 'ema': ema}, {},
                     metrics={'accuracy': 0.1 * step})
  checkpoints.close()
  return folder, model, params


def run_of_images(folder, config):
  """A workdir, three steps old, of a ViT with random parameters: the ViT, and these."""
  (folder / 'config.json').write_text(config.to_json_best_effort())
  vit, random = build(config.model), np.random.default_rng(0)
  params = jax.tree.map(
      lambda leaf: jnp.asarray(0.3 * random.normal(size=leaf.shape), leaf.dtype),
      jax.eval_shape(lambda key: image_task.init(vit, key), jax.random.key(0)))
  checkpoints = Checkpoints(folder / 'checkpoints')
  checkpoints.save(3, {'state': {'step': jnp.asarray(3)}, 'ema': params}, {},
                   metrics={'accuracy': 0.1})
  checkpoints.close()
  return vit, params
