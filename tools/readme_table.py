"""Writes the method table into README.md from the methods' own docstrings.

  python -m tools.readme_table
"""

import inspect
import pathlib
import re

from models.compressors import COMPRESSORS
from models.plan import methods
from ops.reducers.cache import CACHE_REDUCERS

README = pathlib.Path(__file__).parent.parent / 'README.md'
BEGIN, END = '<!-- methods: begin -->', '<!-- methods: end -->'


def table() -> str:
  """The table as Markdown: one row a method, in alphabetical order."""
  rows = ['| method | what it does | acts | reads | paper |', '|---|---|---|---|---|']
  for name, method in sorted((methods() | CACHE_REDUCERS).items()):
    text = inspect.cleandoc(method.__doc__)
    what = ' '.join(text.split('\n\n')[0].split())
    paper = re.search(r'arXiv:(\d{4}\.\d{5})', text)
    needs = method.needs if isinstance(method.needs, frozenset) else method().needs
    learned = ' (learned)' if name in COMPRESSORS else ''
    rows.append(f'| `{name}`{learned} | {what} | {method.site} | '
                f'{", ".join(f"`{need}`" for need in sorted(needs)) or "features"} | '
                f'{f"arXiv:{paper[1]}" if paper else "baseline"} |')
  return '\n'.join(rows)


def updated(text: str) -> str:
  """README's text with a fresh table between its markers."""
  before, rest = text.split(BEGIN)
  return f'{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}'


if __name__ == '__main__':
  README.write_text(updated(README.read_text()))
