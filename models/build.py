"""Builds a config's model and resolves its reductions; train, eval and the tools share it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any

import jax.numpy as jnp
from jax.sharding import Mesh

from models import checkpoints
from models.backbones.segmenter import segmenter
from models.backbones.vit import ViT, make_vit
from models.reduce_config import Macs, Reductions, with_vision_plan
from ops.attention import pick
from ops.values import CountOrZero, Keys, OneOf, Pixels, check_keys, keys_of

DTYPES = {'float32': jnp.float32, 'bfloat16': jnp.bfloat16}
# Keys of `config.model` that say where parameters come from, not what the model is.
PRETRAINED = {'weights': '', 'weights_image_size': 0, 'fresh': (), 'unused': ()}
Dtype = Annotated[str, OneOf(DTYPES)]
# All keys of `config.model`: fields of ViT but for those that the program sets.
IMAGE_MODEL = Keys({
    **keys_of(ViT).without('plan', 'mesh', 'capture', 'layers').kinds,
    'variant': str, 'dtype': Dtype, 'weights': str,
    'weights_image_size': CountOrZero | tuple[Pixels, Pixels], 'fresh': tuple[str, ...],
    'unused': tuple[str, ...]}, frozenset({'variant'}))


def build(model: Mapping[str, Any], reduce: Reductions | None = None, *,
          macs: Callable[[ViT], Macs] | None = None,
          mesh: Mesh | None = None, platform: str = 'cpu',
          task: Mapping[str, Any] | None = None) -> ViT:
  """Builds the vision transformer that a config describes.

  Args:
    model: `config.model`: a variant, and fields of ViT that differ from it; dtype by name. What
      `pretrained` reads of it is left alone, and keys that are None are unset.
    reduce: `config.reduce.vision`, or None for an unreduced model. Keys that are None are unset.
    macs: model -> MACs as a function of events, for budgets in FLOPs (lib/cost/vit.py).
    mesh: where the model will run, None for a single device.
    platform: of its devices; decides the attention kernel.
    task: `config.task`; under the name 'segment' with the fields that a SegmentViT adds.

  Raises:
    ValueError: for anything in the config that cannot be; one line, naming what to change.
  """
  check_keys('model', model, IMAGE_MODEL)
  settings = {name: value for name, value in model.items()
              if value is not None and name not in PRETRAINED}
  dtype = settings.pop('dtype', 'float32')
  settings.setdefault('implementation', pick(platform, DTYPES[dtype]))
  vit = make_vit(settings.pop('variant'), dtype=DTYPES[dtype], mesh=mesh, **settings)
  head = dict(task or {'name': 'classify'})
  if head.pop('name') == 'segment':
    vit = segmenter(vit, **head)
  return with_vision_plan(vit, reduce, macs=macs)


def pretrained(model: Mapping[str, Any], vit: ViT) -> dict[str, Any] | None:
  """The parameters that a config starts from, or None where it names no weights.

  Args:
    model: `config.model`. Of it: `weights`, a safetensors file, a folder or a name on the hub;
      `weights_image_size`, the size of images that they are for where it is not the model's own
      (position embeddings are then resized); `fresh`, parameters to start anew, as ('head',);
      `unused`, patterns of names in the checkpoint to leave out.
    vit: the model, from `build`.

  Raises:
    ValueError: as models/checkpoints does.
  """
  if not model.get('weights'):
    return None
  size = model.get('weights_image_size') or vit.image_size
  theirs = vit.clone(plan=None, image_size=size if isinstance(size, int) else tuple(size))
  params = checkpoints.load(theirs, model['weights'], fresh=tuple(model.get('fresh') or ()),
                            unused=tuple(model.get('unused') or ()))
  if theirs.image_size != vit.image_size:
    params = checkpoints.resize_positions(params, theirs, image_size=vit.image_size)
  return params
