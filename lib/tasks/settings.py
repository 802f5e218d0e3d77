"""The keys of a config, each with its type and its range, checked before anything is made.

A key is declared here, or where what it configures is: fields of data (lib/data/settings.py), of
models (their classes), of methods. What a value must be beside others is checked where both are
read: budgets in ops/budgets.py, a batch and its devices in train.py.
"""

# TypedDicts find optional keys by their annotations, which must not be strings.

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Annotated, Any, NotRequired, TypedDict

from ml_collections import ConfigDict

from lib.data.settings import ImageSettings, QASettings
from lib.runtime import checkpoint, sharding
from lib.tasks.base import task_name
from models import renames
from models.backbones.lm import LM
from models.backbones.segmenter import SegmentViT
from models.backbones.vit import ViT
from models.backbones.vlm import VLM
from models.build import IMAGE_MODEL, Dtype
from models.plan import KEYS, methods
from models.projector import ACROSS, ORDERS
from models.projectors import PROJECTORS
from models.reduce_config import COMPONENTS
from ops import choices
from ops.budgets import BUDGETS
from ops.tokens import KINDS
from ops.values import (
  Count,
  CountOrZero,
  Keys,
  NotEmpty,
  NotNegative,
  OneOf,
  Pattern,
  Positive,
  Range,
  Rate,
  Ratio,
  Seed,
  check,
  check_keys,
  keys_of,
)

Weight = NotNegative
Method = Annotated[str, OneOf(methods())]
Component = Annotated[str, OneOf(COMPONENTS)]
# A pattern of parameters, and the axes that divide their last dimensions.
Rule = tuple[Annotated[str, Pattern()], tuple[Annotated[str, OneOf(sharding.AXES)] | None, ...]]
Layers = Annotated[tuple[CountOrZero, ...], NotEmpty()]


class Optimizer(TypedDict):
  """AdamW, and the average of its parameters that is evaluated."""

  peak_lr: Positive
  warmup_steps: CountOrZero
  weight_decay: NotNegative
  clip_norm: Positive
  ema_decay: Rate
  accumulate: Count
  frozen: NotRequired[tuple[str, ...]]


class Distill(TypedDict):
  """An unreduced model to learn from: the workdir of its run, '' for none."""

  teacher: str
  logit_weight: Weight
  token_weight: Weight


class Consistency(TypedDict):
  """Weaker plans that train beside the plan (`anneal.levels`)."""

  levels: Annotated[int, Range(0, 64)]
  weight: Weight


class ImageOptimizer(Optimizer):
  """Adds what training on classes of images or pixels has."""

  label_smoothing: Rate
  distill: NotRequired[Distill]
  consistency: NotRequired[Consistency]


class AnswersDistill(TypedDict):
  """A model whose answers are learned from: the workdir of its run, '' for none."""

  teacher: str
  logit_weight: Weight


class QAOptimizer(Optimizer):
  """Adds weights of the tower's and the text's own losses, for questions and answers."""

  distill: NotRequired[AnswersDistill]
  patch_weight: Weight
  # None: the other text is not scored, and has no logits.
  text_weight: NotRequired[Weight | None]


class Anneal(TypedDict):
  """Phases of a plan that grows (`anneal.phases`)."""

  start_step: CountOrZero
  stop_step: CountOrZero
  phases: Annotated[int, Range(0, 64)]


class MeshSizes(TypedDict, total=False):
  """Devices along each axis, -1 for the rest (lib/runtime/sharding.py)."""

  data: int
  fsdp: int
  tensor: int
  sequence: int


class Sweep(TypedDict):
  """Holds what sweeps over all tasks have: timed rounds, 0 for none, and names of baselines."""

  title: str
  rounds: Annotated[int, Range(0, 10_000)]
  baselines: tuple[str, ...]


class ImageSweepSettings(Sweep):
  """As `lib.tasks.image_sweep.ImageSweep` describes."""

  methods: tuple[Method, ...]
  budget: Annotated[str, OneOf(BUDGETS)]
  budgets: Annotated[tuple[Positive, ...], NotEmpty()]
  layers: Layers
  overrides: Mapping[Method, Mapping[str, Any]]
  pictured: tuple[Method, ...]
  pictured_images: Annotated[int, Range(1, 100)]
  baseline: NotRequired[Method]
  baseline_draws: NotRequired[Annotated[int, Range(0, 10_000)]]


# Of a place without a method too, where nothing reads the other keys.
_Layers = Annotated[str, OneOf(['all'])] | CountOrZero | tuple[CountOrZero, ...]
_Kind = Annotated[str, OneOf(KINDS)]
REDUCTION = KEYS | Keys({'layers': _Layers, 'watch': _Layers,
                         'token_kinds': _Kind | tuple[_Kind, ...],
                         'across': Annotated[str, OneOf(ACROSS)],
                         'order': Annotated[str, OneOf(ORDERS)]})
# Of a place: one, or several in one tower.
REDUCTIONS = dataclasses.replace(REDUCTION, several=True)
class Stage(TypedDict):
  """A stretch of training under reductions of its own, from a step on (`lib.tasks.qa.stages`)."""

  start_step: CountOrZero
  reduce: Keys(dict.fromkeys(COMPONENTS, REDUCTIONS))  # type: ignore[valid-type]


CANDIDATE = REDUCTION | Keys(
    {'name': str, 'place': Annotated[str, OneOf((*COMPONENTS, 'image'))], 'versus': str,
     'budgets': tuple[Ratio, ...]}, frozenset({'name', 'place'}))


class QASweepSettings(Sweep):
  """As `lib.tasks.qa_sweep.QASweep` describes."""

  sets: tuple[tuple[str, Count], ...]
  candidates: tuple[CANDIDATE, ...]  # type: ignore[valid-type]
  budgets: Annotated[tuple[Annotated[float, Range(high=1, above=0)], ...], NotEmpty()]
  macs: NotRequired[tuple[Ratio, ...]]
  behind: NotRequired[CountOrZero]
  pictured: NotRequired[tuple[str, ...]]


class Search(TypedDict):
  """Says what tools/search_schedule.py searches for.

  Tokens are those before the first of the layers; counts are multiples of `step`; accuracy may fall
  by `loss`; `mean` is the share of tokens over all layers, 0 for that of the first search; `args`
  are bounds of numbers that the method takes, and `reduction` what else its config has.
  """

  method: Method
  place: Component
  layers: Annotated[tuple[CountOrZero, ...], NotEmpty()]
  tokens: Count
  step: Count
  loss: NotNegative
  mean: Ratio
  calls: Count
  args: Mapping[str, tuple[float, float]]
  reduction: Mapping[str, Any]


class Budget(TypedDict):
  """A budget of a study under its name: tokens left after each of the layers."""

  budget: str
  layers: Layers
  keep: Annotated[tuple[Count, ...], NotEmpty()]


class Tune(TypedDict):
  """The short training of a study; its other keys are those of `config.optimizer`."""

  total_steps: Count
  batch_size: Count
  peak_lr: Positive
  warmup_steps: CountOrZero
  ema_decay: Rate


class Recipe(TypedDict):
  """A training of a study (configs/digits_study.py)."""

  name: str
  method: Method
  budget: str
  train_method: NotRequired[Method]
  teacher: NotRequired[bool]
  model: NotRequired[Mapping[str, Any]]
  optimizer: NotRequired[Mapping[str, Any]]
  anneal: NotRequired[Mapping[str, Any]]


class Study(TypedDict):
  """As tools/study.py reads it."""

  title: str
  results: str
  seeds: Annotated[tuple[Seed, ...], NotEmpty()]
  eval_batch_size: Count
  methods: tuple[Method, ...]
  baselines: tuple[str, ...]
  overrides: Mapping[Method, Mapping[str, Any]]
  budgets: tuple[Budget, ...]
  reference: Method
  lower: tuple[Budget, ...]
  resolutions: tuple[tuple[str, Count], ...]
  tuned: str
  tune: Tune
  recipes: tuple[Recipe, ...]


class Expected(TypedDict, total=False):
  """Published figures (tools/reproduce.py)."""

  source: str
  top1: Positive
  unreduced_top1: Positive
  gmacs: Positive
  convention: str
  images_per_second: tuple[Positive, Positive]
  mismatch: str


_KEYS: dict[str, Any] = {
    'seed': Seed, 'total_steps': Count, 'log_steps': Count, 'eval_steps': Count,
    'checkpoint_steps': Count, 'start': str, 'mesh': MeshSizes,
    'sharding': tuple[Rule, ...], 'study': Study, 'expected': Expected,
    'needs': Mapping[str, str]}
_IMAGE = _KEYS | {
    'data': keys_of(ImageSettings), 'model': IMAGE_MODEL, 'optimizer': ImageOptimizer,
    'anneal': Anneal, 'sweep': ImageSweepSettings,
    'reduce': Keys({'vision': REDUCTIONS}), 'task': Keys({'name': str})}
_LM = keys_of(LM).without('vocabulary', 'rope', 'dtype', 'implementation', 'plan', 'cache_plan',
                          'mesh', 'capture', 'reader') | Keys({'theta': Positive})
_TOWER = keys_of(ViT).without('num_classes', 'image_size', 'pool', 'last_norm', 'dtype', 'plan',
                              'implementation', 'mesh', 'capture', 'layers')
_OF_VLM = {key: keys_of(VLM).kinds[key] for key in ('projection', 'side', 'patch_labels')} | {
    'compressor': Keys({'name': Annotated[str, OneOf(('none', *PROJECTORS))],
                        'args': Mapping[str, Any], 'turns': tuple[Mapping[str, Any], ...],
                        'train': Annotated[str, OneOf(('draw', 'all'))]}, frozenset({'name'}))}
_QA_MODEL = Keys({'lm': dataclasses.replace(_LM, by_path=True),
                  'tower': dataclasses.replace(_TOWER, by_path=True), 'dtype': Dtype, **_OF_VLM},
                 frozenset({'lm', 'dtype'}))
# All keys of a config, by the name of its task.
TABLES: dict[str, dict[str, Any]] = {
    'classify': _IMAGE,
    'segment': _IMAGE | {'task': Keys({'name': str}) | keys_of(SegmentViT).without(
        *keys_of(ViT).kinds)},
    'answers': _KEYS | {
        'data': keys_of(QASettings), 'model': _QA_MODEL, 'optimizer': QAOptimizer,
        'sweep': QASweepSettings, 'search': Search, 'stages': tuple[Stage, ...],
        'reduce': Keys(dict.fromkeys(COMPONENTS, REDUCTIONS)),
        'task': Keys({'name': str})},
}
TABLES['align'] = TABLES['answers']
# What commands read.
EVALUATION = ('seed', 'data', 'model', 'reduce', 'mesh', 'sharding')
TRAINING = (*EVALUATION, 'total_steps', 'log_steps', 'eval_steps', 'checkpoint_steps', 'optimizer')


def check_config(config: ConfigDict | Mapping[str, Any], *needed: str) -> None:
  """Checks every value of a config.

  Args:
    config: as the files in configs/ make it, or of a run's config.json.
    needed: keys that it must have, as `TRAINING`.

  Raises:
    ValueError: a key that is unknown or missing, a value of another type or outside its range, or
      values that contradict each other; one line that names the key.
  """
  config = config.to_dict() if isinstance(config, ConfigDict) else dict(config)
  for part in ('task', 'sweep'):
    if config.get(part) is not None:
      check(f'config.{part}', config[part], Mapping[str, Any])
      config[part] = renames.current(part, config[part])
  if hasattr(config.get('reduce'), 'keys'):
    config['reduce'] = {place: renames.current('reduce', each) if hasattr(each, 'keys') else each
                        for place, each in config['reduce'].items()}
  task = task_name(config)
  choices.check('config.task.name=', task, TABLES)
  check_keys('config', config, Keys(TABLES[task], frozenset(needed)))
  total, warmup = config.get('total_steps'), config.get('optimizer', {}).get('warmup_steps')
  if None not in (total, warmup) and total <= warmup:
    raise ValueError(f'config.total_steps={total} must be more than '
                     f'optimizer.warmup_steps={warmup}, in which the learning rate only rises: '
                     'raise it, or lower optimizer.warmup_steps')


def check_sources(config: ConfigDict) -> None:
  """Raises a FileNotFoundError if a run that a training takes parameters from is not there.

  Args:
    config: of a training, as `check_config` lets it pass.
  """
  teacher = config.optimizer.get('distill', {}).get('teacher')
  for key, workdir in (('start', config.get('start')), ('optimizer.distill.teacher', teacher)):
    folder = pathlib.Path(workdir or '.')
    if workdir and not ((folder / 'checkpoints').is_dir() or (folder / checkpoint.PACKED).exists()):
      raise FileNotFoundError(f'{key}={workdir} has no checkpoint: name the workdir of a run that '
                              'has one')
