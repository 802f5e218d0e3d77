"""Docstrings of Python's standard library, for retrieval: the first paragraph asks for the rest."""

from __future__ import annotations

import ast
import pathlib
import sysconfig
from collections.abc import Iterator

import numpy as np

# Characters: what is shorter says too little to be told from others.
QUERY, DOCUMENT = 20, 100


def docstring_pairs(rng: np.random.Generator, count: int,
                    folder: pathlib.Path | None = None) -> tuple[list[str], list[str]]:
  """Reads what functions and classes say of themselves, from their sources; nothing is imported.

  Of every public one in the modules of the folder: the first paragraph, and all behind it. Of equal
  ones the first counts. How many there are depends on the Python that runs: 3.11.7 has 915.

  Args:
    rng: chooses among them.
    count: how many.
    folder: of modules; None for the standard library of the Python that runs.

  Returns:
    `count` queries, and the document of each.

  Raises:
    ValueError: there are fewer.
  """
  folder = folder or pathlib.Path(sysconfig.get_path('stdlib'))
  pairs: dict[str, str] = {}
  taken = set()
  for path in sorted(folder.glob('*.py')):
    for query, document in _pairs(path):
      if len(query) >= QUERY and len(document) >= DOCUMENT and query not in pairs and (
          document not in taken):
        pairs[query] = document
        taken.add(document)
  if len(pairs) < count:
    raise ValueError(f'{folder} has {len(pairs)} docstrings of a sentence and more, and {count} '
                     'are asked for: ask for fewer')
  every = list(pairs.items())
  chosen = [every[index] for index in rng.permutation(len(every))[:count]]
  return [query for query, _ in chosen], [document for _, document in chosen]


def _pairs(path: pathlib.Path) -> Iterator[tuple[str, str]]:
  """Yields the first paragraph of each docstring of a module, and the rest, on one line each."""
  for node in ast.walk(ast.parse(path.read_bytes())):
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and (
        not node.name.startswith('_')):
      first, _, rest = (ast.get_docstring(node) or '').partition('\n\n')
      yield ' '.join(first.split()), ' '.join(rest.split())
