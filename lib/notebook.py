"""Models as a notebook uses them: loaded by a name, then asked, explained and evaluated.

  model = load('results/digit_scenes')
  model.generate('how many digits are there ?', images=['scene.png'],
                 reduce={'language': {'method': 'fastv', 'layers': 2, 'keep_ratio': 0.5}})

A reduction is a dict by place ('vision', 'projector', 'language', 'cache') of what
`config.reduce.<place>` takes. {} reduces nothing; None stands for what a run was trained with.

Axes: B batch, S image side, C channels, K classes or features.
"""

from __future__ import annotations

import functools
import itertools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from PIL import Image

from lib import assistant
from lib.assistant import Assistant
from lib.cost import explain as cost_text
from lib.cost import lm as lm_cost
from lib.cost import vit as vit_cost
from lib.data import images as image_data
from lib.data import qa as qa_data
from lib.data.image_files import read_image, upright
from lib.data.prepare import data_dir_of_run
from lib.runtime import sharding
from lib.tasks import image_sweep, qa_sweep
from lib.tasks import qa as qa_task
from lib.tasks.base import sum_counts
from lib.tasks.image_metrics import metric_of
from lib.tasks.settings import EVALUATION, check_config
from lib.tasks.trained import TrainedModel, load_run
from models import build
from models.backbones.lm import LM
from models.backbones.vit import ViT
from models.backbones.vlm import VLM
from models.checkpoints import files, gguf
from models.checkpoints.json_files import naming, value_of
from models.decoding.sampling import Sampling
from models.plan import Settings, reduction_settings

Reduce = Mapping[str, Any]
# Ids of a prompt that a checkpoint's costs are told for, unless somebody asks for others.
PROMPT = 1024
NEW_TOKENS = 64


def load(source: str | pathlib.Path, *, variant: str = '', dtype: str = 'float32',
         data_dir: str = '', **settings: Any) -> LanguageModel | ImageModel:
  """Loads a model by what is in its folder.

  Args:
    source: the workdir of a run of train.py, or a folder that tools/pack.py wrote
      (results/digit_scenes); a checkpoint's folder; its name on the hub, as 'owner/name'; or a
      .gguf file of a language model.
    variant: of an image checkpoint, which architecture it is, as 'deit_s16' (models/families.py).
    dtype: of a checkpoint's products, 'float32' or 'bfloat16'. A run keeps its own.
    data_dir: where a run's data set is, if not where the run found it. Only `evaluate` reads it,
      and loading a run that is not packed.
    **settings: of an image checkpoint, fields of ViT that differ from the variant, and those of
      `models.build.pretrained`, as num_classes=0, image_size=384 or weights_image_size=224.

  Raises:
    ValueError, FileNotFoundError: nothing there, an architecture that is not known, or what the
      loaders raise; one line, naming what to change.
  """
  if variant:
    config = ml_collections.ConfigDict({'model': {
        'variant': variant, 'dtype': dtype, 'weights': str(source), **settings}})
    vit = build.build(config.model)
    return ImageModel(config, build.pretrained(config.model, vit))
  if settings:
    raise ValueError(f'{", ".join(settings)} belong to an image checkpoint: name its variant, as '
                     "variant='deit_s16', or leave them out")
  path = files.locate(source)
  if path.suffix == gguf.SUFFIX:
    return LanguageModel(assistant.load(path, dtype=dtype))
  config = files.config(path)
  with naming(path):
    model = value_of(config, 'model', Mapping[str, Any]) or {}
  if 'variant' in model:
    return _image_run(path, ml_collections.ConfigDict(config), data_dir)
  if 'lm' in model:
    trained = load_run(path, data_dir=data_dir)
    return LanguageModel(assistant.of_run(trained), trained)
  if path.is_dir() and 'model_type' in config:
    return LanguageModel(assistant.load(path, dtype=dtype))
  raise ValueError(f'{path} is no run, and no checkpoint of a language model: for one of a vision '
                   "transformer name its variant, as load(..., variant='deit_s16')")


def _image_run(path: pathlib.Path, config: ml_collections.ConfigDict, data_dir: str) -> ImageModel:
  check_config(config, *EVALUATION)
  if 'data' in config:
    config.data.data_dir = data_dir or data_dir_of_run(config.data)
  # Its weights are in its folder: what it began from may be anywhere.
  config.model.weights = ''
  step, params = image_sweep.load(config, path, _one_device())
  return ImageModel(config, params, step)


def _one_device() -> jax.sharding.Mesh:
  return sharding.make_mesh({}, jax.devices()[:1])


class LanguageModel:
  """A language model, or a vision-language model.

  Attributes:
    assistant: the model with its parameters, tokenizer and image steps.
    trained: its run, None for a checkpoint.
  """

  def __init__(self, assistant: Assistant, trained: TrainedModel | None = None):
    self.assistant, self.trained = assistant, trained
    # A generator keeps what it compiled: the same reduction again costs no compiling.
    self._generators: dict[str, Any] = {}

  @property
  def sees(self) -> bool:
    """True if the model takes images."""
    return not isinstance(self.assistant.model, LM)

  def generate(self, text: str, *, images: Sequence[str | pathlib.Path | Image.Image] = (),
               reduce: Reduce | None = None, new_tokens: int | None = None,
               sampling: Sampling | None = None, seed: int = 0, template: bool = True) -> str:
    """Answers a text.

    Args:
      text: the prompt; '<image>' stands where an image goes, which else come first.
      images: files or images.
      reduce: reductions by place.
      new_tokens: the most to decode; by default what the longest answer of a run's data takes, of
        a checkpoint 64, or what the context has room for.
      sampling: greedy by default.
      seed: of sampling.
      template: whether to wrap the text in the checkpoint's chat template, if it has one.

    Raises:
      ValueError: images for a model that reads text alone, an unknown place or method, a budget
        that cannot be met, or a prompt that is too long.
    """
    pictures = [_opened(image) for image in images]
    prompt = self.assistant.prompt(text, images=len(pictures), template=template)
    model = self.assistant.with_grid_for(pictures)
    generator = self._generator(model, reduce)
    seen = model.encode_images([pictures])
    if new_tokens is None:
      visual = generator.plans.visual_slots(None if seen is None else seen.layout)
      most = 1 + self.trained.info.answer_length if self.trained else NEW_TOKENS
      new_tokens = max(1, min(most, model.model.context - visual - len(prompt)))
    answer, = generator([prompt], seen, new_tokens=new_tokens, sampling=sampling, seeds=seed)
    return model.text(answer)

  def explain(self, reduce: Reduce | None = None, *, slots: int | None = None) -> str:
    """Returns tokens, MACs and bytes of every layer, before anything runs.

    Args:
      reduce: reductions by place.
      slots: ids of the prompt; by default the context of a run's data, or 1,024. A vision-language
        model reads one image, of the size that its tower takes, beside them.
    """
    if slots is None:
      slots = self.trained.config.data.context if self.trained else PROMPT
      slots = min(slots, self.assistant.model.context)
    layout = None
    if self.sees:
      side = getattr(self.assistant.model.tower, 'image_size', 0) or 224
      images = self.assistant.encode_images([[Image.new('RGB', (side, side))]])
      assert images is not None
      layout = images.layout
    chosen = self._by_component(self.assistant.reduce if reduce is None else reduce)
    return cost_text.describe(self.assistant.model, reduce=chosen, prompt=slots, layout=layout)

  def evaluate(self, reduce: Reduce | None = None, *, batches: int | None = None) -> dict[str, Any]:
    """Answers the questions of a run's test split, greedily, as eval.py does.

    Args:
      reduce: reductions by place.
      batches: only so many batches of the split; None for all.

    Returns:
      'accuracy', the share of answers that are right to the last token; 'by', the same by kind of
      question (or by where the answer stands in the text); 'questions', how many there were; and
      of reading one prompt 'gmacs', 'kv_mb' and 'kept_mean', slots in the cache, layer mean.

    Raises:
      ValueError: a checkpoint, which has no test split; or what the reduction is wrong in.
    """
    if self.trained is None:
      raise ValueError('a checkpoint has no test split of its own: measure it with a harness '
                       '(python -m adapters.lm_harness, python -m adapters.lmms)')
    config, info = self.trained.config, self.trained.info
    reduce = self._by_component(self.assistant.reduce if reduce is None else reduce)
    model = qa_task.build(config.model, reduce, info, context=config.data.context,
                          platform=jax.default_backend())
    groups, longest = info.kinds or qa_sweep.TENTHS, 1 + info.answer_length
    run = jax.jit(functools.partial(qa_sweep.count, model, len(groups), longest))
    chosen = itertools.islice(qa_data.eval_batches(config.data), batches)
    right, count = sum_counts([run(self.assistant.params, batch) for batch in chosen]).T
    visual = qa_task.visual_tokens(model) if isinstance(model, VLM) else 0
    lm = model.lm if isinstance(model, VLM) else model
    read = lm_cost.of(lm, config.data.context + visual, room=longest)
    tower = vit_cost.of(model.tower).macs if isinstance(model, VLM) else 0
    return {
        'accuracy': float(right.sum() / count.sum()),
        'by': {group: float(r / c) for group, r, c in zip(groups, right, count, strict=True) if c},
        'questions': int(count.sum()), 'gmacs': (read.macs + tower) / 1e9,
        'kv_mb': read.kv_bytes / 1e6,
        'kept_mean': sum(layer.cached for layer in read.layers) / len(read.layers)}

  def _by_component(self, reduce: Reduce) -> dict[str, Settings]:
    """Reductions as the models take them: of visual tokens alone, unless they say otherwise."""
    chosen = {component: reduction_settings(each) for component, each in reduce.items()}
    language = chosen.get('language') or []
    for each in [language] if isinstance(language, dict) else language:
      if self.sees:
        each.setdefault('token_kinds', 'visual')
    return chosen

  def _generator(self, model: Assistant, reduce: Reduce | None) -> Any:
    reduce = self._by_component(model.reduce if reduce is None else reduce)
    key = repr((sorted(reduce.items()), self.sees and model.model.tower))
    if key not in self._generators:
      self._generators[key] = model.generator(reduce)
    return self._generators[key]


class ImageModel:
  """A vision transformer: a classifier, a segmenter or an encoder.

  Attributes:
    config: of its run; of a checkpoint its `config.model` alone.
    params: its parameters.
    step: of the checkpoint, 0 for pretrained weights.
  """

  def __init__(self, config: ml_collections.ConfigDict, params: Any, step: int = 0):
    self.config, self.params, self.step = config, params, step
    self._models: dict[str, tuple[ViT, Any, Any]] = {}

  def __call__(self, images: np.ndarray,
               reduce: Reduce | None = None) -> tuple[jax.Array, dict[str, Any]]:
    """Classifies images.

    Args:
      images: float[B, S, S, C], normalised as the model was trained.
      reduce: {'vision': {...}}.

    Returns:
      Logits float32[B, K], or features where there is no classifier, and what the model tells
      (`models.backbones.vit.ViT`): the last 'tokens', and under 'cuts' those after each cut.
    """
    _, params, run = self._model(reduce)
    return run(params, images)

  def generate(self, text: str, **unused: Any) -> str:
    """Raises ValueError: a model of images alone says nothing."""
    raise ValueError('this model sees images and says nothing: call it with images, as '
                     'model(images), or load a language or vision-language model')

  def explain(self, reduce: Reduce | None = None) -> str:
    """Returns tokens, MACs and bytes of every layer for one image, before anything runs."""
    return cost_text.describe(self._built(reduce))

  def evaluate(self, reduce: Reduce | None = None, *, batches: int | None = None) -> dict[str, Any]:
    """Scores the test split of a run's data, as eval.py does, without its timings.

    Args:
      reduce: {'vision': {...}}.
      batches: only so many batches of the split; None for all.

    Returns:
      The score under its own name ('accuracy' or 'miou'), and of one image 'gmacs' and
      'kept_mean', tokens that leave a layer, layer mean.

    Raises:
      ValueError: a checkpoint, which has no test split; or what the reduction is wrong in.
    """
    if 'data' not in self.config:
      raise ValueError('a checkpoint has no test split of its own: evaluate it by a config that '
                       'names its data (python -m eval --config=configs/deit_s16_sweep.py)')
    vit, params, run = self._model(reduce)
    task, counts = metric_of(self.config), []
    for batch in itertools.islice(image_data.eval_batches(self.config.data), batches):
      logits, _ = run(params, batch['image'])
      counts.append(task.counts(logits, jnp.asarray(batch['label']), jnp.asarray(batch['mask'])))
    cost = vit_cost.of(vit)
    return {task.score: task.total(sum_counts(counts)), 'gmacs': cost.macs / 1e9,
            'kept_mean': sum(layer.left for layer in cost.layers) / len(cost.layers)}

  def _built(self, reduce: Reduce | None) -> ViT:
    """The model under a reduction, its budget resolved."""
    if reduce is None:
      reduce = self.config.get('reduce') or {}
    for component in reduce:
      if component != 'vision':
        raise ValueError(f"reduce.{component} is not a place of this model: it has 'vision' alone")
    return build.build(self.config.model, reduce.get('vision'), macs=vit_cost.solver,
                       platform=jax.default_backend(), task=self.config.get('task'))

  def _model(self, reduce: Reduce | None) -> tuple[ViT, Any, Any]:
    """The model, its parameters and its compiled call; kept, as compiling takes long."""
    key = json.dumps(reduce, sort_keys=True, default=str)
    if key not in self._models:
      vit = self._built(reduce)
      params = image_sweep.complete(vit, self.params, seed=self.config.get('seed', 0))
      self._models[key] = vit, params, jax.jit(
          lambda params, images: vit.apply({'params': params}, images))
    return self._models[key]


def _opened(image: str | pathlib.Path | Image.Image) -> Image.Image:
  return upright(image) if isinstance(image, Image.Image) else read_image(image)
