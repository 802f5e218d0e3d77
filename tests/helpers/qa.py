"""Small question-answering configs, batches and models."""

import jax
import numpy as np

from lib.data.datasets import digit_scenes
from lib.data.qa import Info
from lib.tasks import qa as qa_task

SCENES = Info(len(digit_scenes.WORDS), 0, 1, 2, digit_scenes.KINDS, 6, 6, (64, 64, 3), (), 1)
NEEDLE = Info(258, 256, 257, None, (), 6, 6, None, (), 6)
ROWS = 4


def small(config):
  config = config.get_config()
  config.model.lm.update(width=16, depth=2, mlp=16, heads=2, kv_heads=1, head_width=8)
  if 'tower' in config.model:
    config.model.tower.update(width=16, depth=2, mlp=16, heads=2, patch=16)
  return config


def batch_of(info, context, seed=0):
  """Questions of several lengths, with answers of one token and an end token."""
  random = np.random.default_rng(seed)
  ids = np.full((ROWS, context), info.pad, np.int32)
  valid, answer = np.zeros(ids.shape, bool), np.zeros(ids.shape, bool)
  for row, length in enumerate((10, 7, 12, 9)):
    ids[row, :length] = random.integers(3, 30, length)
    ids[row, 0] = info.image or 5
    ids[row, length - 1] = info.end
    valid[row, :length], answer[row, length - 2:length] = True, True
  batch = {'ids': ids, 'valid': valid, 'answer': answer, 'kind': np.array([0, 1, 1, 2]),
           'mask': np.ones(ROWS, np.float32)}
  if info.image_shape:
    batch |= {'image': random.normal(size=(ROWS, 64, 64, 3)).astype(np.float32),
              'cells': random.integers(0, 12, (ROWS, 4, 4))}
  return batch


def made(config, info, **reduce):
  config.reduce.update(reduce)
  model = qa_task.build(config.model, config.reduce, info, context=config.data.context)
  initial = jax.jit(lambda key: qa_task.init(model, info, config.data.context, key))
  return model, initial(jax.random.key(0))
