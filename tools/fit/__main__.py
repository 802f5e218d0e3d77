"""Fits what DyMU, FitPrune, VTW and `explained` need to know of a model, on a few samples.

  python -m tools.fit --model=runs/digits --method=dymu --merge=8
  python -m tools.fit --model=results/digit_scenes --method=fitprune --flops_ratio=0.7
  python -m tools.fit --model=checkpoints/llava-1.5-7b-hf --dtype=bfloat16 --method=vtw \\
      --divergence=0.003 --questions=asked.jsonl
  python -m tools.fit --model=results/digit_scenes --method=explained --train_steps=300 \\
      --out=runs/explained

dymu: a cosine a layer of the vision tower, above which --merge tokens of an image merge on average.
fitprune: how many visual tokens leave in each layer of the language model.
vtw: the layer before which all of them may leave.
explained: the network that foresees what is relevant; --out is then a run with it, as tools.pack
writes one, which leaves --keep_ratio of the visual tokens.
A model is a run of train.py, of images (for dymu) or of questions, or a checkpoint's folder; runs
read their own training images or questions, in batches of --batch_size; for a checkpoint each line
of --questions is JSON: {"image": "photo.png", "text": "What is on the table?"}. What is found is
printed as a config has it.
"""

from __future__ import annotations

import itertools
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import flags

from lib import assistant
from lib.assistant import Assistant
from lib.data import images as image_data
from lib.data import qa as qa_data
from lib.data.image_files import read_image
from lib.runtime import checkpoint, checksums, cli, sharding
from lib.tasks import image_sweep, pretrained, trained
from lib.tasks import qa as qa_task
from models.backbones.images import Images
from models.backbones.vlm import VLM
from models.build import build
from models.checkpoints.json_files import naming, read_json, read_text
from models.decoding.sampling import padded
from ops.tokens import TokenSet
from tools.fit.fits import LayerByLayer, merge_thresholds, prune_schedule, withdrawal_layer
from tools.fit.network import REDUCER, foresee

METHODS = ('dymu', 'fitprune', 'vtw', 'explained')

# May override: a process of tests imports several commands.
MODEL = flags.DEFINE_string('model', None, "A run's workdir, or a folder with a checkpoint.",
                            allow_override=True)
METHOD = flags.DEFINE_enum('method', None, METHODS, 'What to fit.')
SAMPLES = flags.DEFINE_integer('samples', 64, 'Images or questions to fit to.', lower_bound=1)
BATCH_SIZE = flags.DEFINE_integer('batch_size', 16, 'Those that run at a time.', lower_bound=1)
QUESTIONS = flags.DEFINE_string('questions', None, 'What to ask a checkpoint: a file of JSON '
                                'lines.')
MERGE = flags.DEFINE_integer('merge', 8, 'Of dymu: tokens of an image that merge in each layer, on '
                             'average.', lower_bound=1)
FLOPS_RATIO = flags.DEFINE_float('flops_ratio', 0.5, "Of fitprune: share of the language model's "
                                 'products that is left.')
DIVERGENCE = flags.DEFINE_float('divergence', 0.003, 'Of vtw: what the distribution of the next '
                                'token may differ by, as a Kullback-Leibler divergence.')
FIRST = flags.DEFINE_integer('first', 1, 'Of vtw: the first layer to try; 5 in its release.',
                             lower_bound=1)
STEPS = flags.DEFINE_integer('train_steps', 300, 'Of explained: steps of training, a batch each.',
                             lower_bound=1)
RATE = flags.DEFINE_float('train_rate', 3e-3, 'Of explained: of learning.')
KEEP_RATIO = flags.DEFINE_float('keep_ratio', 0.25, 'Of explained: visual tokens that stay.')
OUT = flags.DEFINE_string('out', None, 'Of explained: the folder to write.', allow_override=True)
DTYPE = flags.DEFINE_string('dtype', 'float32', "A checkpoint's parameters: float32 or bfloat16.",
                            allow_override=True)
DATA_DIR = flags.DEFINE_string('data_dir', '', "Where a run's set is, if not where the run had it.",
                               allow_override=True)

Inputs = tuple[Any, ...]


def main(argv: Sequence[str]) -> None:
  """Fits what the flags say, and prints it."""
  del argv
  folder = pathlib.Path(MODEL.value)
  if METHOD.value == 'explained':
    write_foreseen(folder)
    return
  if METHOD.value == 'dymu' and _of_images(folder):
    thresholds = _of_image_run(folder)
  else:
    model = assistant.load(MODEL.value, dtype=DTYPE.value, data_dir=DATA_DIR.value)
    if not isinstance(model.model, VLM):
      raise ValueError(f'{METHOD.value} is fitted to what visual tokens do, and this model sees no '
                       'images: give one that does')
    model, rows = read(model)
    samples = itertools.islice(rows, batches())
    if METHOD.value != 'dymu':
      for place, reduce in language(model, samples).items():
        print(f'config.reduce.{place} = {reduce}')
      return
    thresholds = merge_thresholds(model.model.tower, model.params['tower'],
                                  (crops(images) for _, _, images in samples), merge=MERGE.value)
  found = tuple(round(each, 4) for each in thresholds)
  print('config.reduce.vision =', {'method': 'dymu', 'layers': 'all', 'remove': 1,
                                   'args': {'threshold': found}})


def write_foreseen(folder: pathlib.Path) -> None:
  """Trains the network of `explained` on a run's questions, and writes the run with it."""
  if not OUT.value:
    raise ValueError('explained is a network that has to be kept: give --out, a folder for the run '
                     'with it')
  if _of_images(folder) or not (folder / 'config.json').exists():
    raise ValueError(f'{folder} is no run that answers questions about images, which explained is '
                     'fitted to: give the workdir of one')
  run = trained.load_run(folder, data_dir=DATA_DIR.value)
  model = assistant.of_run(run)
  if not isinstance(model.model, VLM) or model.reduce:
    raise ValueError('explained is fitted to a model that sees images and reduces nothing, and '
                     f'that of {folder} is another: give one trained without config.reduce')
  reduce = {'method': 'explained', 'layers': 0, 'keep_ratio': KEEP_RATIO.value,
            'token_kinds': 'visual'}
  samples = itertools.islice(_of_run(model), batches())
  network, missed = foresee(model.model.lm, run.params['lm'],
                            list(sequences(model, samples)), reduce=reduce, steps=STEPS.value,
                            rate=RATE.value)
  tenth = max(len(missed) // 10, 1)
  print(f'divergence from what is relevant: {missed[:tenth].mean():.3f} at first, '
        f'{missed[-tenth:].mean():.3f} at the end')
  config = ml_collections.ConfigDict(run.config.to_dict())
  with config.unlocked():
    config.reduce.language = {**config.reduce.get('language', {}), **reduce}
  lm = run.params['lm']
  params = run.params | {'lm': lm | {'stack': lm['stack'] | {REDUCER: network}}}
  out = pathlib.Path(OUT.value)
  path = checkpoint.pack(pretrained.split(params, pretrained.names(config))[0], run.step, out)
  (out / 'config.json').write_text(config.to_json_best_effort(indent=2) + '\n')
  trained.save_info(run.info, out)
  checksums.write(out, [path.name, 'config.json', trained.INFO])
  print(f'{path}: {path.stat().st_size / 1e6:.1f} MB')


def batches() -> int:
  """Returns how many batches are read at most."""
  return -(-SAMPLES.value // BATCH_SIZE.value)


def sequences(model: Assistant, samples: Iterator[Inputs]) -> Iterator[TokenSet]:
  """Yields the tokens that the language model reads."""
  embed = jax.jit(lambda params, *given: model.model.apply({'params': params}, *given,
                                                           method='sequence')[0])
  for each in samples:
    yield embed(model.params, *each)


def language(model: Assistant, samples: Iterator[Inputs]) -> dict[str, dict[str, Any]]:
  """Fits what acts in the language model: the reduction by place."""
  vlm, params = model.model, model.params
  prompts = list(sequences(model, samples))
  layers = LayerByLayer(vlm.lm, params['lm'])
  reduce = {'method': METHOD.value, 'token_kinds': 'visual'}
  if METHOD.value == 'vtw':
    layer, mean = withdrawal_layer(layers, prompts, divergence=DIVERGENCE.value, first=FIRST.value)
    print('divergence by layer:', ' '.join(f'{each:.3g}' for each in mean))
    return {'language': {**reduce, 'layers': layer, 'keep': 0}}
  return {'language': {**reduce, **prune_schedule(layers, prompts,
                                                  flops_ratio=FLOPS_RATIO.value)}}


def crops(images: Images) -> np.ndarray:
  """Returns the crops of all rows, without those that only fill a batch up."""
  pixels = np.asarray(images.pixels).reshape(-1, *images.pixels.shape[2:])
  return pixels[pixels.any(axis=(1, 2, 3))]


def read(model: Assistant) -> tuple[Assistant, Iterator[Inputs]]:
  """Returns batches as a vision-language model takes them, and the model that they fit into."""
  if QUESTIONS.value:
    return _asked(model, pathlib.Path(QUESTIONS.value))
  if model.data is None:
    raise ValueError('a checkpoint has no questions of its own: give --questions')
  return model, _of_run(model)


def _of_run(model: Assistant) -> Iterator[Inputs]:
  """Questions that a run learned from, without the answers."""
  data = ml_collections.ConfigDict(model.data.to_dict())
  data.update(batch_size=BATCH_SIZE.value, turns=1)
  rows = qa_data.train_iterator(data, seed=0)
  try:
    for batch in rows:
      yield qa_task.inputs(model.model, {**batch, 'valid': batch['valid'] & ~batch['answer']})[:3]
  finally:
    rows.close()


def _asked(model: Assistant, path: pathlib.Path) -> tuple[Assistant, Iterator[Inputs]]:
  """Questions of a file, all padded to the longest."""
  with naming(path):
    lines = [json.loads(line) for line in read_text(path).splitlines() if line.strip()]
  if not all(isinstance(line, dict) and {'image', 'text'} <= line.keys() for line in lines):
    raise ValueError(f'{path} must have an object a line, with "image" and "text"')
  pictures = [read_image(path.parent / line['image']) for line in lines]
  fits = model.with_grid_for(pictures)
  prompts = [model.prompt(line['text'], images=1) for line in lines]
  slots = max(map(len, prompts), default=0)
  parts = (slice(start, start + BATCH_SIZE.value)
           for start in range(0, len(lines), BATCH_SIZE.value))
  return fits, ((*padded(prompts[part], slots, side='right'),
                 fits.encode_images([[each] for each in pictures[part]])) for part in parts)


def _of_images(folder: pathlib.Path) -> bool:
  """Tells whether a folder is a run on images alone."""
  file = folder / 'config.json'
  return file.exists() and 'variant' in (read_json(file).get('model') or {})


def _of_image_run(folder: pathlib.Path) -> tuple[float, ...]:
  """Thresholds of a run on images."""
  config = ml_collections.ConfigDict(read_json(folder / 'config.json'))
  config.data.data_dir = DATA_DIR.value or config.data.data_dir
  config.data.batch_size = BATCH_SIZE.value
  _, params = image_sweep.load(config, folder, sharding.make_mesh({}, jax.devices()[:1]))
  vit = build(config.model, task=config.get('task'))
  read = image_data.train_iterator(config.data, seed=0)
  try:
    pixels = (jnp.asarray(np.asarray(each['image']))
              for each in itertools.islice(read, batches()))
    return merge_thresholds(vit, params, pixels, merge=MERGE.value)
  finally:
    read.close()


if __name__ == '__main__':
  flags.mark_flags_as_required(['model', 'method'])
  cli.run(main)
