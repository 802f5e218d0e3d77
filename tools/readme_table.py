"""Writes the tables of README.md and METHODS.md from the code that they describe.

  python -m tools.readme_table
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from models import families
from models.backbones.bert import Bert
from models.backbones.text_tower import Text
from models.backbones.vit import make_vit
from models.catalogue import entries, every_method, projectors, why_not
from models.checkpoints.vlm_config import make_vlm
from models.plans.hosts import Host
from models.projectors import PROJECTORS

ROOT = pathlib.Path(__file__).parent.parent
PAPERS = 'https://arxiv.org/abs/'

@dataclasses.dataclass(frozen=True)
class Family:
  """Describes a row of the table of backbones.

  Attributes:
    title: as the family is called.
    prefixes: of its names.
    file: in models/backbones/.
    names: of families.py, other families' too.
    checkpoints: libraries with layouts of it that tests/models/ loads.
    errors: the bounds of tests/models/test_parity*.py on layers and on outputs.
  """

  title: str
  prefixes: tuple[str, ...]
  file: str
  names: Mapping[str, Any]
  checkpoints: str = 'timm, transformers'
  errors: str = '3e-5, 1e-5'


_lm = functools.partial(Family, file='lm.py', names=families.LMS, checkpoints='transformers',
                        errors='1e-4, 1e-4')
_vlm = functools.partial(Family, file='vlm.py', names=families.VLMS, checkpoints='transformers',
                         errors='1e-4, 1e-4')
FAMILIES = (
    Family('ViT', (), 'vit.py', {}),
    Family('DeiT', ('deit_',), 'vit.py', families.NAMED),
    Family('MAE', ('mae_',), 'vit.py', families.NAMED),
    Family('DINOv2', ('dinov2_',), 'vit.py', families.NAMED),
    Family('CLIP, the image tower or both', ('clip_',), 'clip.py', families.NAMED),
    Family('SigLIP, the image tower or both', ('siglip_',), 'clip.py', families.NAMED),
    Family('SigLIP 2, the image tower or both', ('siglip2_',), 'clip.py', families.NAMED,
           'transformers'),
    _lm('Llama 2', ('llama2_',)),
    _lm('Vicuna', ('vicuna_',)),
    _lm('Llama 3', ('llama3_', 'llama3.')),
    _lm('Mistral', ('mistral_',)),
    _lm('Qwen2', ('qwen2_', 'qwen2.5_')),
    _lm('Qwen3', ('qwen3_',)),
    _vlm('LLaVA-1.5', ('llava1.5_',)),
    _vlm('LLaVA-NeXT', ('llava1.6_',)),
    _vlm('LLaVA-OneVision', ('llava_onevision_',)),
    _vlm('Qwen2-VL', ('qwen2_vl_',)),
    _vlm('Qwen2.5-VL', ('qwen2.5_vl_',)),
)



def methods_table() -> str:
  """Returns one row a method, in alphabetical order, its file and its paper linked."""
  rows = ['| method | what it does | acts | reads | paper |', '|---|---|---|---|---|']
  for entry in entries().values():
    learned = ' (learned)' * entry.learned + ' †' * bool(entry.reconstructed)
    needs = ', '.join(f'`{need}`' for need in entry.needs) or 'features'
    paper = f'[arXiv:{entry.paper}]({PAPERS}{entry.paper})' if entry.paper else 'baseline'
    rows.append(f'| [`{entry.name}`]({entry.file}){learned} | {entry.summary} | {entry.site} | '
                f'{needs} | {paper} |')
  return '\n'.join(rows)


def projectors_table() -> str:
  """Returns one row a projector that compresses: its file, what it reads and leaves, its paper."""
  rows = ['| projector | what it does | reads beside features | of 24 x 24 patches | paper |',
          '|---|---|---|---|---|']
  for entry in projectors().values():
    left = PROJECTORS[entry.name](width=8).slots((24, 24))
    needs = ', '.join(f'`{need}`' for need in entry.needs)
    rows.append(f'| [`{entry.name}`]({entry.file}) | {entry.summary} | {needs} | {left} | '
                f'[arXiv:{entry.paper}]({PAPERS}{entry.paper}) |')
  return '\n'.join(rows)


def backbones_table() -> str:
  """Returns one row a family: its file, its names, what loads, and the greatest error allowed.

  Raises:
    ValueError: a name of models/families.py that no family has.
  """
  rows = ['| family | file | names | checkpoints of | greatest error: layers, outputs |',
          '|---|---|---|---|---|']
  listed: set[str] = set()
  for family in FAMILIES:
    names = [name for name in family.names if name.startswith(family.prefixes)]
    listed |= set(names)
    named = ', '.join(f'`{name}`' for name in names) or 'size and patch, as `S/16`'
    rows.append(f'| {family.title} | [{family.file}](models/backbones/{family.file}) | {named} | '
                f'{family.checkpoints} | {family.errors} |')
  left = set().union(*(family.names for family in FAMILIES)) - listed
  if left:
    raise ValueError(f'{", ".join(sorted(left))} of models/families.py is in no family of '
                     'FAMILIES: add its prefix')
  return '\n'.join(rows)


def hosts() -> dict[str, tuple[Host, str]]:
  """Returns {what METHODS.md calls it: (host, place)}, a host of each kind that offers its own."""
  llava, siglip, qwen = (make_vlm(name) for name in (
      'llava1.5_7b', 'llava_onevision_7b', 'qwen2_vl_2b'))
  parts = {'width': 64, 'depth': 2, 'mlp': 64, 'heads': 1, 'vocabulary': 8, 'context': 32}
  lm = llava.lm.host(600, visual=576)
  return {
      'ViT': (make_vit('S/16').host, 'layers'),
      'ViT without [CLS]': (siglip.tower.host, 'layers'),
      "Qwen's tower": (qwen.tower.host, 'layers'),
      'BERT': (Bert(**parts).host(32), 'layers'),
      'text tower': (Text(**parts, causal=True, pool='eot').host, 'layers'),
      'projector': (llava.projector_host(576), 'projector'),
      'projector, no [CLS]': (siglip.projector_host(729), 'projector'),
      "projector, Qwen's tower": (qwen.projector_host(256), 'projector'),
      'language model': (lm, 'layers'),
      'cache': (lm, 'cache')}


def hosts_table() -> str:
  """Returns one row a method: where it acts, and which hosts can have it, or what they lack."""
  columns, listed = hosts(), entries()
  rows = [f'| method | acts | {" | ".join(columns)} |', '|---' * (2 + len(columns)) + '|']
  for name in every_method():
    reasons = [why_not(name, host, place) for host, place in columns.values()]
    cells = ['' if 'made for the cache' in reason else reason or 'yes' for reason in reasons]
    rows.append(f'| `{name}` | {listed[name].site} | {" | ".join(cells)} |')
  return '\n'.join(rows)


TABLES: dict[str, dict[str, Callable[[], str]]] = {
    'README.md': {'methods': methods_table, 'projectors': projectors_table,
                  'backbones': backbones_table},
    'METHODS.md': {'hosts': hosts_table}}


def updated(text: str, file: str = 'README.md') -> str:
  """Returns a file's text with fresh tables between their markers.

  Raises:
    ValueError: a table's markers are not there once each.
  """
  for name, table in TABLES[file].items():
    begin, end = f'<!-- {name}: begin -->', f'<!-- {name}: end -->'
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
      raise ValueError(f'{file} has no place for its table of {name}: put {begin!r} and {end!r} '
                       'into it, once each and in this order')
    before, rest = text.split(begin)
    text = f'{before}{begin}\n{table()}\n{end}{rest.split(end)[1]}'
  return text


if __name__ == '__main__':
  for file in TABLES:
    (ROOT / file).write_text(updated((ROOT / file).read_text(), file))
