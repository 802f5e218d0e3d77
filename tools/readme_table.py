"""Writes the tables of methods and of backbones into README.md, from the code they describe.

  python -m tools.readme_table
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterable

from models import families
from models.catalogue import entries

README = pathlib.Path(__file__).parent.parent / 'README.md'
PAPERS = 'https://arxiv.org/abs/'


def methods_table() -> str:
  """Returns one row a method, in alphabetical order, its file and its paper linked."""
  rows = ['| method | what it does | acts | reads | paper |', '|---|---|---|---|---|']
  for entry in entries().values():
    learned = ' (learned)' if entry.learned else ''
    needs = ', '.join(f'`{need}`' for need in entry.needs) or 'features'
    paper = f'[arXiv:{entry.paper}]({PAPERS}{entry.paper})' if entry.paper else 'baseline'
    rows.append(f'| [`{entry.name}`]({entry.file}){learned} | {entry.summary} | {entry.site} | '
                f'{needs} | {paper} |')
  return '\n'.join(rows)


def backbones_table() -> str:
  """Returns one row a kind of backbone: its file, where its names are used, and the names."""
  kinds = (
      ('vision transformers', 'models/backbones/vit.py', families.NAMED),
      ('pairs of image and text tower', 'models/backbones/clip.py', families.PAIRS),
      ('language models', 'models/backbones/lm.py', families.LMS),
      ('vision-language models', 'models/backbones/vlm.py', families.VLMS))
  rows = ['| kind | file | names in `models/families.py` |', '|---|---|---|']
  rows += [f'| {kind} | [{file}]({file}) | {_listed(names)} |' for kind, file, names in kinds]
  return '\n'.join(rows)


def _listed(names: Iterable[str]) -> str:
  return ', '.join(f'`{name}`' for name in names)


TABLES: dict[str, Callable[[], str]] = {'methods': methods_table, 'backbones': backbones_table}


def updated(text: str) -> str:
  """Returns README's text with fresh tables between their markers.

  Raises:
    ValueError: a table's markers are not there once each.
  """
  for name, table in TABLES.items():
    begin, end = f'<!-- {name}: begin -->', f'<!-- {name}: end -->'
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
      raise ValueError(f'README.md has no place for its table of {name}: put {begin!r} and {end!r} '
                       'into it, once each and in this order')
    before, rest = text.split(begin)
    text = f'{before}{begin}\n{table()}\n{end}{rest.split(end)[1]}'
  return text


if __name__ == '__main__':
  README.write_text(updated(README.read_text()))
