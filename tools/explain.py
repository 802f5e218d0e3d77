"""Explains the cost of a model, layer by layer, before anything runs.

  python -m tools.explain --config=configs/vit_s16_tome.py
  python -m tools.explain --config=configs/vit_s16_tome.py --config.reduce.vision.method=pitome
  python -m tools.explain --config=configs/digit_scenes.py --config.reduce.language.method=fastv \\
      --config.reduce.language.layers=1 --config.reduce.language.keep_ratio=0.5
  python -m tools.explain --model=llava1.5_7b --prompt=36 --new_tokens=64 \\
      --reduce.language.method=fastv --reduce.language.layers=2 --reduce.language.keep_ratio=0.5 \\
      --reduce.cache.method=snapkv --reduce.cache.keep=1024
  python -m tools.explain --model=results/digit_scenes --reduce.vision.method=tome \\
      --reduce.vision.remove=8
  python -m tools.explain --model=llava1.5_7b --compressor.name=tokenpacker \\
      --compressor.args="{'side': 3}"

Prints tokens, MACs and bytes of every layer; of language models also the cache, as it is kept and
as it is allocated, and a decode step; totals under the conventions of different papers, beside the
unreduced model; of vision transformers the products that the method itself adds, from the traced
program; and the published figures where this is a model and a budget that somebody published. No
parameters are made. --notrace leaves out the tracing, which takes seconds for deep models.

A prompt counts what it holds: text and visual tokens. When it runs, an image's placeholder leaves a
slot of padding, and prompts are padded to one of a few lengths (models/decoding/generator.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from configs.parts import compressor, reductions
from lib import architecture
from lib.architecture import Source
from lib.cost.explain import describe
from lib.runtime import cli, config_flag
from models.backbones.vlm import VLM
from models.reduce_config import COMPONENTS

MODEL = flags.DEFINE_string('model', None, "A family, as llava1.5_7b; a run's workdir; or a folder "
                            'with the config.json of a checkpoint.')
PROMPT = flags.DEFINE_integer('prompt', None, 'Text tokens of the prompt.', lower_bound=1)
NEW_TOKENS = flags.DEFINE_integer('new_tokens', None, 'The most to decode; by default 64, or what '
                                  'the context has room for.', lower_bound=0)
IMAGES = flags.DEFINE_integer('images', 1, 'Images beside the prompt.', lower_bound=0,
                              upper_bound=1024)
IMAGE_SIZE = flags.DEFINE_list('image_size', None, 'Height,width of each image in pixels, where a '
                               'model reads crops, or patches of any number.')
cli.check_counts('image_size', length=2, high=16384)
DTYPE = flags.DEFINE_string('dtype', 'bfloat16', "Of a family's or a checkpoint's parameters and "
                            'products: float32 or bfloat16.')
TRACE = flags.DEFINE_bool('trace', True, "Whether to count the method's own products.")


def main(argv: Sequence[str]) -> None:
  """Prints the explanation of --config or --model."""
  del argv
  config = flags.FLAGS.config
  if (config is None) == (MODEL.value is None):
    raise ValueError('one of --config and --model says what to explain: give '
                     '--config=configs/vit_s16_tome.py, or --model=llava1.5_7b')
  source = (architecture.find(MODEL.value, dtype=DTYPE.value) if config is None
            else architecture.of_config(config))
  if flags.FLAGS.compressor.name:
    source = architecture.with_compressor(source, flags.FLAGS.compressor)
  print(explain(source, flags.FLAGS.reduce))


def explain(source: Source, overrides: Mapping[str, Any]) -> str:
  """Returns the whole text, under the reductions of the source and those of the flags.

  Raises:
    ValueError: as `lib.cost.explain.describe`; flags of a place without a method.
  """
  reduce = chosen(source, overrides)
  size = None
  if IMAGE_SIZE.value:
    size = int(IMAGE_SIZE.value[0]), int(IMAGE_SIZE.value[1])
  prompt = source.prompt if PROMPT.value is None else PROMPT.value
  model, layout = source.model, source.layout(IMAGES.value, size)
  if isinstance(model, VLM) and layout is None:
    raise ValueError('--images=0 leaves a vision-language model nothing to see: give 1 or more, or '
                     'the family of its language model')
  return describe(model, reduce=reduce, prompt=prompt, new_tokens=NEW_TOKENS.value, layout=layout,
                  trace=TRACE.value)


def chosen(source: Source, overrides: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
  """Returns the reductions by place: of the flags, else of the source."""
  reduce = {component: dict(config) for component, config in source.reduce.items()
            if config is not None}
  for component in COMPONENTS:
    settings = {name: value for name, value in overrides[component].items() if value is not None}
    method, layers = settings['method'], settings['layers']
    if not method:
      if len(settings) > 2 or layers != 'all':
        raise ValueError(f'--reduce.{component} names no method: add '
                         f'--reduce.{component}.method=...')
      continue
    if component == 'language' and isinstance(source.model, VLM):
      settings.setdefault('token_kinds', 'visual')
    reduce[component] = settings
  return reduce


if __name__ == '__main__':
  config_flag.define('What to explain, a file of configs/.')
  config_flag.define_dict('reduce', reductions(), 'Reductions, by place.')
  config_flag.define_dict('compressor', compressor(''), 'What projects in place of the MLP.')
  cli.run(main)
