"""Asks a model something, and shows the answer as it is decoded.

  python -m tools.generate --model=runs/scenes --example=3
  python -m tools.generate --model=runs/scenes --image=photo.png \\
      --prompt='which digit is at row 2 column 3 ?' \\
      --reduce.language.method=fastv --reduce.language.layers=1 --reduce.language.keep_ratio=0.5 \\
      --show=kept.png
  python -m tools.generate --model=checkpoints/llava-1.5-7b-hf --dtype=bfloat16 \\
      --image=photo.png --prompt='What is on the table?' --reduce.projector.method=divprune \\
      --reduce.projector.keep=64
  python -m tools.generate --model=runs/needle --prompt_file=question.txt
  python -m tools.generate --model=checkpoints/SmolLM2-135M-Instruct --prompt_file=question.txt \\
      --kvzip=0.3

A model is a run of configs/digit_scenes.py or configs/stdlib_needle.py, or a folder with a
checkpoint: config.json, tokenizer.json, safetensors, and for images preprocessor_config.json. Of
llama.cpp's files, as SmolLM2-135M-Instruct.Q4_1.gguf, one is enough.
Reductions are those of --reduce, place by place; where it says nothing, those that a run was
trained with. --reduce.PLACE.method=none is no reduction there.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags

from configs.parts import reductions
from lib import assistant
from lib.assistant import Assistant
from lib.data import qa as qa_data
from lib.data.image_files import read_image
from lib.data.pictures import Picture, row_of
from lib.data.token_layout import raster_layout
from lib.report import overlay, provenance
from lib.runtime import cli, config_flag
from models.backbones.images import Images, image_counts
from models.backbones.lm import LM
from models.backbones.vlm import VLM
from models.checkpoints.json_files import read_text
from models.decoding.generator import BUCKETS as LENGTHS
from models.decoding.generator import Generator
from models.decoding.sampling import Sampling, padded
from models.reduce_config import COMPONENTS

MODEL = flags.DEFINE_string('model', None, "A run's workdir, a folder with a checkpoint, or "
                            'a .gguf file.')
IMAGES = flags.DEFINE_multi_string('image', [], 'An image file; several in the order of the text.')
PROMPT = flags.DEFINE_string('prompt', None, 'What to ask.')
PROMPT_FILE = flags.DEFINE_string('prompt_file', None, 'A file with what to ask.')
EXAMPLE = flags.DEFINE_integer('example', None, "A question of a run's test split, instead.",
                               lower_bound=0)
TEMPLATE = flags.DEFINE_bool('template', True, "Whether to wrap the text in the checkpoint's "
                             'chat template. --notemplate is for a text that writes out all that '
                             'the model reads, special tokens among it.')
NEW_TOKENS = flags.DEFINE_integer('new_tokens', None, 'The most to decode; by default 64, or what '
                                  'the context has room for.', lower_bound=1)
TEMPERATURE = flags.DEFINE_float('temperature', 0.0, '0 takes the likeliest token.')
TOP_K = flags.DEFINE_integer('top_k', 0, 'Only among so many of the likeliest; 0 for all.',
                             lower_bound=0)
TOP_P = flags.DEFINE_float('top_p', 1.0, 'Only among the likeliest that reach this together.')
SEED = flags.DEFINE_integer('seed', 0, 'Of sampling.', lower_bound=0, upper_bound=2 ** 32 - 1)
BUCKETS = flags.DEFINE_list('buckets', [str(size) for size in (16, 32, *LENGTHS)],
                            'Lengths that a prompt is padded to.')
cli.check_counts('buckets')
KVZIP = flags.DEFINE_float('kvzip', None, 'Share of the cache that stays once the model has '
                           'repeated the prompt, as KVzip has it; of text, without reductions.')
DTYPE = flags.DEFINE_string('dtype', 'float32', "A checkpoint's parameters: float32 or bfloat16.")
DATA_DIR = flags.DEFINE_string('data_dir', '', "Where a run's set is, if not where the run had it.")
WARM = flags.DEFINE_bool('warm', False, 'Answer once before, unseen: times are then without '
                         'compiling.')
SHOW = flags.DEFINE_string('show', None, 'Where to draw what is left of the image, as kept.png.')


# Reductions that act on patches, so that a picture shows them.
DRAWN = ('vision', 'projector', 'language')
MOST_LINES = 8

REDUCE = config_flag.define_dict('reduce', reductions(), 'Reductions, by place.')


@dataclasses.dataclass(frozen=True)
class Question:
  """Holds a prompt with its images.

  Attributes:
    images: to be looked at.
    prompt: ids, with a placeholder an image.
    answer: the true one, of a question from a set.
  """

  images: Sequence[Picture]
  prompt: Sequence[int]
  answer: str | None = None


def main(argv: Sequence[str]) -> None:
  """Loads, answers, and prints what it took."""
  del argv
  sampling = Sampling(TEMPERATURE.value, TOP_K.value, TOP_P.value)
  model = assistant.load(MODEL.value, dtype=DTYPE.value, data_dir=DATA_DIR.value)
  model, question = read_question(model) if EXAMPLE.value is None else (model, example(model))
  reduce, images = chosen(model, REDUCE.value), model.encode_images([question.images])
  if SHOW.value and not (question.images and set(DRAWN) & reduce.keys()):
    raise ValueError(f'--show={SHOW.value} has nothing to show: give an image, and a reduction of '
                     f'one of {", ".join(DRAWN)}')
  generator = model.generator(
      reduce, buckets=[int(size) for size in BUCKETS.value],
      kvzip=None if KVZIP.value is None else model.kvzip(KVZIP.value))
  layout = None if images is None else images.layout
  visual = generator.plans.visual_slots(layout)
  room = model.model.context - visual - len(question.prompt)
  new_tokens = NEW_TOKENS.value if NEW_TOKENS.value is not None else max(1, min(64, room))

  def stream() -> Iterator[np.ndarray]:
    return generator.stream([question.prompt], images, new_tokens=new_tokens,
                            sampling=sampling, seeds=SEED.value)

  if WARM.value:
    list(stream())
  started, ids, times, shown = time.perf_counter(), [], [], ''
  for tokens in stream():
    ids.append(int(tokens[0]))
    times.append(time.perf_counter() - started)
    text = model.text(ids)
    # A character may take several tokens.
    if not text.endswith('\ufffd'):
      print(text[len(shown):], end='', flush=True)
      shown = text
  print(model.text(ids)[len(shown):])
  if question.answer is not None:
    print(f'(the true answer: {question.answer})')
  slots, _ = generator.slots(len(question.prompt), new_tokens, visual=visual)
  reduced = generator.plans(slots, layout)
  # What a prompt keeps is its own: the plans for its very length say it, whatever it is padded to.
  own = generator.plans(len(question.prompt), layout)
  told = took(generator, own, question, images, times)
  told.insert(1, f'padded to {slots + visual} slots')
  if KVZIP.value is not None:
    told.insert(2, f'cache: kvzip keeps {KVZIP.value:.0%} of the entries')
  print('\n'.join(told), file=sys.stderr)
  if SHOW.value:
    show(reduced, model, padded([question.prompt], slots), question.images, images,
         pathlib.Path(SHOW.value))


def read_question(model: Assistant) -> tuple[Assistant, Question]:
  """Reads the question of the flags; returns it, and the model with a grid that fits its images."""
  prompts = [flag.value for flag in (PROMPT, PROMPT_FILE) if flag.value is not None]
  if len(prompts) != 1:
    raise ValueError('nothing to ask: give --prompt, --prompt_file or --example, one of them')
  text = PROMPT.value
  if text is None:
    text = read_text(pathlib.Path(PROMPT_FILE.value))
  if not text.strip():
    raise ValueError('nothing to ask: the prompt is empty')
  images = [read_image(path) for path in IMAGES.value]
  prompt = model.prompt(text, images=len(images), template=TEMPLATE.value)
  model = model.with_grid_for(images)
  return model, Question(row_of([model.look(image) for image in images]), prompt)


def example(model: Assistant) -> Question:
  """Reads a question of a run's test split, and prints it."""
  if PROMPT.value or PROMPT_FILE.value or IMAGES.value:
    raise ValueError('--example brings its own prompt and image: leave out --prompt, --prompt_file '
                     'and --image')
  if model.data is None:
    raise ValueError('a checkpoint has no examples: give --prompt, and --image for images')
  row = qa_data.example(model.data, EXAMPLE.value)
  prompt = row['ids'][row['valid'] & ~row['answer']].tolist()
  print(model.tokens.decode(prompt))
  images = []
  if 'image' in row:
    images.append(Picture(row['image'][None], *raster_layout(model.look.tokens)))
  return Question(images, prompt, model.text(row['ids'][row['answer']].tolist()))


def chosen(model: Assistant, settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
  """Returns reductions by place: of the flags, else those that the model was trained with."""
  by_component = {}
  for component in COMPONENTS:
    own = {name: value for name, value in settings[component].items() if value is not None}
    if not own['method']:
      left = {name: value for name, value in own.items()
              if name not in ('method', 'layers')} or own['layers'] != 'all'
      if left:
        raise ValueError(f'--reduce.{component} names no method: add '
                         f'--reduce.{component}.method=...')
      own = dict(model.reduce.get(component, {}))
    if own:
      by_component[component] = own
  return by_component


def took(generator: Generator, own: LM | VLM, question: Question, images: Images | None,
         times: Sequence[float]) -> list[str]:
  """Describes in lines what answering took, by the model with the plans of the prompt alone."""
  lines = [f'{len(question.prompt)} ids in the prompt']
  if images is not None:
    lines[0] += f', {int(np.maximum(image_counts(images), 0).sum())} visual tokens'
  lines += describe_reductions(own)
  rate = (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else 0.0
  lines.append(f'first token after {times[0]:.3f} s' + (f', then {rate:.1f} a second' if rate else
                                                        '') + f'; {len(times)} in all')
  programs = sum(generator.compilations.values())
  when = 'before' if WARM.value else 'meanwhile: --warm leaves that out'
  return [*lines, f'{programs} programs compiled {when}']


def describe_reductions(reduced: LM | VLM) -> list[str]:
  """Describes in lines what each reduction keeps."""
  sees = isinstance(reduced, VLM)
  lm = reduced.lm if sees else reduced
  plans = {'language': lm.plan, 'cache': lm.cache_plan}
  if sees:
    projector = reduced.projector_reduction and reduced.projector_reduction.plan
    plans = {'vision': reduced.tower.plan, 'projector': projector} | plans
  lines = []
  for component, plan in plans.items():
    # A plan that only listens cuts nothing.
    for event in plan.events if plan else ():
      held = event.protected or 0
      place = 'in' if event.kind == 'branch' else event.site
      where = {'projector': '', 'cache': f' in layer {event.layer}'}.get(
          component, f' {place} layer {event.layer}')
      left, before = event.slots_out - held, event.slots_in - held
      does = {'insert': f'brings in {left - before}', 'branch': f'runs {left} of {before}',
              'expand': f'brings back {left - before}'}.get(
                  event.kind, f'keeps {left} of {before}')
      lines.append(f'{component}: {event.reduction.name} {does}{where}')
  if len(lines) > MOST_LINES:
    lines = [*lines[:MOST_LINES - 1], f'… and {len(lines) - MOST_LINES + 1} cuts more']
  return lines


def show(reduced: VLM, model: Assistant, prompt: tuple[np.ndarray, np.ndarray],
         pictures: Sequence[Picture], images: Images, path: pathlib.Path) -> None:
  """Draws every image with what each reduction left of it."""
  def look(params: Any, images: Images) -> dict[str, Any]:
    _, out = reduced.apply({'params': params}, *prompt, images)
    return {name: out.get(name) for name in ('tower_tokens', 'layout', 'projector', 'visual',
                                             'sequence', 'cuts')}

  stages = provenance.stages(reduced, jax.jit(look)(model.params, images))
  first = 0
  for number, picture in enumerate(pictures):
    crops = slice(first, first + len(picture.pixels))
    first = crops.stop
    rows, columns = provenance.grid(reduced)
    if picture.sizes is not None:
      rows, columns = (int(side) // reduced.tower.merge for side in picture.sizes[0])
    groups = {stage.name: [
        overlay.Groups(labels[:rows, :columns], merged[:rows, :columns],
                       len(np.unique(labels[labels >= 0])))
        for labels, merged in zip(stage.labels[crops], stage.merged[crops], strict=True)]
        for stage in stages}
    names = [f'crop {crop}' if crop else 'whole' for crop in range(len(picture.pixels))]
    file = path if number == 0 else path.with_stem(f'{path.stem}_{number}')
    overlay.stages(model.look.shown(picture), groups, file, names=names if len(names) > 1 else ())
    print(f'{file}: ' + '; '.join(f'{stage.tokens[number]} tokens left after {stage.name}'
                                  for stage in stages), file=sys.stderr)


if __name__ == '__main__':
  flags.mark_flag_as_required('model')
  cli.run(main)
