"""Models without parameters: of a config, a run's or a checkpoint's folder, or a family name.

  source = find('llava1.5_7b')               # or a folder with config.json
  source = of_config(digit_scenes.get_config())
  print(describe(source.model, reduce=source.reduce, prompt=source.prompt,
                 layout=source.layout(images=1)))

No weights are read, no data set is prepared, and nothing is compiled.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import tensorflow_datasets as tfds
from ml_collections import ConfigDict
from PIL import Image

from lib import assistant
from lib.data import anyres, qa
from lib.data.pictures import row_of
from lib.tasks import qa as qa_task
from lib.tasks.settings import check_config
from models.backbones.clip import Clip, make_clip
from models.backbones.images import Layout
from models.backbones.lm import LM
from models.backbones.qwen_vision import QwenVision
from models.backbones.vit import ViT, make_vit
from models.backbones.vlm import VLM
from models.build import DTYPES, build
from models.checkpoints.json_files import read_json
from models.checkpoints.vlm_config import tower_config
from models.families import LMS, NAMED, PAIRS, SIZES, VLMS
from models.projectors import make_projector
from ops import choices

Model = ViT | Clip | LM | VLM
Size = tuple[int, int]

# Steps of pixels, whose values play no part here: only the number of tokens does.
_STEPS: dict[str, Any] = {'do_resize': False, 'do_rescale': False, 'do_normalize': False}
# Crops along the side of an image where nobody says its size.
_CROPS = 2


@dataclasses.dataclass(frozen=True)
class Source:
  """Holds a model without parameters, and what is known of its prompts.

  Attributes:
    model: without reductions.
    reduce: reductions by place that its config names; {} for none.
    prompt: ids of its prompts; None where nothing says so.
    checkpoint: config.json of the checkpoint, or of the family; None for a run.
  """

  model: Model
  reduce: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
  prompt: int | None = None
  checkpoint: Mapping[str, Any] | None = None

  def layout(self, images: int = 1, size: Size | None = None) -> Layout | None:
    """Returns the layout of the images of a row (`models.backbones.images.Images.layout`).

    Args:
      images: how many.
      size: (height, width) of each in pixels. By default two crops each way where a model reads
        crops, and the tower's whole grid where it reads patches of any number.

    Returns:
      None for a model that sees none, and for no images.

    Raises:
      ValueError: an image that the model cannot read, or a negative number of them.
    """
    if images < 0:
      raise ValueError(f'images={images} is impossible: give 0 or more')
    if not isinstance(self.model, VLM) or not images:
      return None
    if self.checkpoint is None:
      return images, images, 0
    tower, steps = self.model.tower, dict(_STEPS)
    if isinstance(tower, QwenVision):
      whole = tower.grid[0] * tower.patch, tower.grid[1] * tower.patch
      steps |= {'patch_size': tower.patch, 'merge_size': tower.merge,
                'temporal_patch_size': tower.temporal}
    else:
      whole = (_CROPS * tower_config(self.checkpoint)['image_size'],) * 2
    read = anyres.from_config(steps, self.checkpoint, grid=tower.grid)
    if isinstance(read, anyres.Square):
      return images, images, 0 if self.model.compressor else tower.grid[0] * tower.grid[1]
    height, width = size or whole
    pictures = row_of([read(Image.new('RGB', (width, height)))] * images)
    return sum(len(each.pixels) for each in pictures), images, len(pictures[0].index)


def with_compressor(source: Source, settings: Mapping[str, Any]) -> Source:
  """Returns a source whose vision-language model has a compressor in place of its MLP.

  Args:
    source: of a vision-language model.
    settings: as `models.projectors.make_projector` takes them.

  Raises:
    ValueError: another model, or as `make_projector` and VLM.
  """
  vlm = source.model
  if not isinstance(vlm, VLM):
    raise ValueError(f'a compressor joins a tower and a language model, and {type(vlm).__name__} '
                     'is not both: explain a vision-language model, as llava1.5_7b')
  made = make_projector(settings, width=vlm.lm.width, dtype=vlm.lm.dtype)
  return dataclasses.replace(source, model=vlm.clone(projection='', compressor=made))


def find(name: str, *, dtype: str = 'bfloat16') -> Source:
  """Returns the model of a folder, or of a family.

  Args:
    name: a run's workdir or what tools/pack.py wrote; a checkpoint's folder; a config.json itself;
      or a name of models/families.py.
    dtype: of a family's or a checkpoint's products and parameters, 'float32' or 'bfloat16'; a run
      keeps its own.

  Raises:
    ValueError: nothing of that kind, a folder without config.json, or an unknown architecture.
  """
  choices.check('dtype ', dtype, DTYPES)
  path = pathlib.Path(name).expanduser()
  if path.exists():
    return of_folder(path, dtype=dtype)
  settings = {'dtype': DTYPES[dtype]}
  size, _, patch = name.partition('/')
  if name in PAIRS:
    return Source(make_clip(name, image=settings, text=settings))
  if name in NAMED or (size in SIZES and patch.isdigit()):
    return Source(make_vit(name, **settings))
  choices.check('no folder, and as a family the model ', name, [*LMS, *VLMS, *NAMED])
  config = LMS.get(name) or VLMS[name]
  return Source(assistant.build(config, **settings), checkpoint=config)


def of_folder(path: pathlib.Path, *, dtype: str = 'bfloat16') -> Source:
  """Returns the model of a folder with config.json, or of that file.

  Raises:
    ValueError: no such file, one that describes no model, or an unknown architecture.
  """
  file = path / 'config.json' if path.is_dir() else path
  if file.suffix != '.json' or not file.exists():
    raise ValueError(f'{path} describes no model: it needs the config.json of a run (train.py) or '
                     'of a checkpoint')
  config = read_json(file)
  if 'model_type' in config:
    return Source(assistant.build(config, dtype=DTYPES[dtype]), checkpoint=config)
  if 'model' not in config:
    raise ValueError(f'{file} describes no model: it names no model_type, as that of a checkpoint '
                     "does, and no 'model', as that of a run does")
  return of_config(ConfigDict(config))


def of_config(config: Mapping[str, Any]) -> Source:
  """Returns the model that a config of configs/ describes.

  Raises:
    ValueError: a config that describes no model, or a reduction in a place that it lacks; one line,
      naming what to change.
  """
  settings = config.get('model')
  if not settings or not (settings.get('variant') or settings.get('lm')):
    raise ValueError("the config says no model: it needs config.model = dict(variant='S/16', ...), "
                     'or config.model.lm')
  check_config(config, 'model')
  reduce = config.get('reduce') or {}
  for component, reduction in reduce.items():
    if reduction is not None and not reduction.get('method'):
      raise ValueError(f"config.reduce.{component} names no method: set method='tome', or another")
  if not settings.get('lm'):
    return Source(build(settings, task=config.get('task')), reduce)
  model = qa_task.build(settings, {}, _set_info(config['data']), context=config['data']['context'])
  return Source(model, reduce, config['data']['context'])


def _set_info(data: Mapping[str, Any]) -> qa.Info:
  """Returns what a model depends on of its set, which need not be prepared."""
  try:
    builder = tfds.builder(data['name'], data_dir=data.get('data_dir') or None)
  except tfds.core.DatasetNotFoundError as error:
    raise ValueError(f'data set {data["name"]!r} is not known: prepare it with tools/prepare.py, '
                     'or set config.data.name') from error
  meta, features = dict(builder.info.metadata or {}), builder.info.features
  image_shape = tuple(features['image'].shape) if 'image' in features else None
  return qa.Info(meta['vocabulary'], meta['pad'], meta['end'], meta.get('image'),
                 tuple(meta.get('kinds', ())), 0, 0, image_shape, tuple(meta.get('words', ())),
                 features['answer'].shape[-1])
