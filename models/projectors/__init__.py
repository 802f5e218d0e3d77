"""Projectors that leave fewer tokens than a tower has patches: the dict that names them."""

from collections.abc import Mapping
from typing import Any

from jax.typing import DTypeLike

from models.projectors.base import Compressor
from models.projectors.crosslmm import CrossLMM
from models.projectors.hicom import HICom
from models.projectors.llava_sp import LLaVASP
from models.projectors.matryoshka import Matryoshka
from models.projectors.mqt import MQT
from models.projectors.quecc import QueCC
from models.projectors.slime import SliME, SliMELocal
from models.projectors.slime_crops import SliMECrops
from models.projectors.timesuite import TimeSuite
from models.projectors.tokenflex import TokenFLEX
from models.projectors.tokenpacker import TokenPacker
from models.projectors.vision_remember import VisionRemember
from models.projectors.vlora import VLoRA
from ops import choices
from ops.values import check_keys, keys_of

PROJECTORS: dict[str, type[Compressor]] = {
    'crosslmm': CrossLMM,
    'hicom': HICom,
    'llava_sp': LLaVASP,
    'matryoshka': Matryoshka,
    'mqt': MQT,
    'quecc': QueCC,
    'slime': SliME,
    'slime_crops': SliMECrops,
    'slime_local': SliMELocal,
    'timesuite': TimeSuite,
    'tokenflex': TokenFLEX,
    'tokenpacker': TokenPacker,
    'vision_remember': VisionRemember,
    'vlora': VLoRA,
}


def make_projector(settings: Mapping[str, Any] | None, *, width: int,
                   dtype: DTypeLike) -> Compressor | None:
  """Makes the projector of `config.model.compressor`.

  Args:
    settings: 'name', one of `PROJECTORS` or 'none', 'args', its fields, and what lib/tasks/qa.py
      reads of it; or None.
    width: of the language model.
    dtype: of the products.

  Returns:
    The module, None for none: an MLP then projects, and leaves every token.

  Raises:
    ValueError: an unknown name or field, something set beside 'none', or a value that cannot be;
      one line that names it.
  """
  if settings is None or settings['name'] == 'none':
    given = [key for key in ('args', 'turns') if settings and settings.get(key)]
    if given:
      raise ValueError(f"model.compressor.{given[0]} is set and model.compressor.name is 'none': "
                       f'name a compressor, or leave it out')
    return None
  choices.check('model.compressor.name=', settings['name'], PROJECTORS)
  made, args = PROJECTORS[settings['name']], dict(settings.get('args') or {})
  own = keys_of(made).without('width', 'dtype')
  check_keys('model.compressor.args', args, own)
  fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value
                            for key, value in args.items()}
  return made(width=width, dtype=dtype, **fields)


def name_of(projector: Compressor | None) -> str:
  """Returns the name of a projector in `PROJECTORS`, 'none' where there is an MLP."""
  return next((name for name, made in PROJECTORS.items() if type(projector) is made), 'none')
