"""Who may import whom, who names whom, and how full a folder may be: read off the syntax alone.

A room is a folder of the root, or one of its files: ops, models, lib, train.
"""

import ast
import collections
import functools
import graphlib
import itertools
import pathlib

ROOT = pathlib.Path(__file__).parents[2]
# The rooms that each room stands on. Tests may import all of them.
BELOW = {
    'ops': set(),
    'models': {'ops'},
    'lib': {'ops', 'models'},
    'configs': {'ops', 'models'},
    'train': {'ops', 'models', 'lib'},
    'eval': {'ops', 'models', 'lib'},
    'winnow': {'ops', 'models', 'lib'},
    'adapters': {'ops', 'models', 'lib'},
    'tools': {'ops', 'models', 'lib', 'configs', 'train', 'eval'},
}
# Each folder in the first, and the second itself, holds one file a method beside its dict.
REDUCERS, COMPRESSORS = 'ops.reducers', 'models.compressors'
# The published rows, each with its method.
PUBLISHED = 'lib.cost.published'
# Names of methods that configs use otherwise too: nothing, and how a ViT pools its features.
OTHER_WORDS = {'none', 'pool'}
# One file a method, or an experiment: as many as there are.
UNBOUNDED = ('ops/reducers/', 'models/compressors', 'models/projectors', 'tests/golden', 'configs')
MOST_FILES = 15
# Lines of a method without parameters; what would make it longer is a primitive.
MOST_LINES = 150
SAYS_NOTHING = {'util', 'utils', 'helper', 'helpers', 'misc', 'common'}


@functools.cache
def modules():
  """Every module of the project by its name, a package's as <package>.__init__: its syntax."""
  rooms = {file.parent for file in ROOT.glob('*/__init__.py')} | {ROOT / 'tests'}
  files = [*ROOT.glob('*.py'), *(file for room in sorted(rooms) for file in room.rglob('*.py'))]
  return {'.'.join(file.relative_to(ROOT).with_suffix('').parts): ast.parse(file.read_text())
          for file in files}


@functools.cache
def imports():
  """Every import of one module of the project by another: (importer, line, imported)."""
  return [(name, node.lineno, found) for name, tree in modules().items() for node in ast.walk(tree)
          for wanted in _wanted(node, name) if (found := _module(wanted))]


def _wanted(node, name):
  """The names that a statement imports, made absolute."""
  if isinstance(node, ast.Import):
    return [alias.name for alias in node.names]
  if isinstance(node, ast.ImportFrom):
    package = '.'.join([*name.split('.')[:-node.level], node.module or ''] if node.level
                       else [node.module])
    return [f'{package.rstrip(".")}.{alias.name}' for alias in node.names]
  return []


def _module(wanted):
  """The module that holds a name; tests are imported from their folder."""
  parts = wanted.split('.')
  for size in range(len(parts), 0, -1):
    stem = '.'.join(parts[:size])
    for name in (stem, f'{stem}.__init__', f'tests.{stem}', f'tests.{stem}.__init__'):
      if name in modules():
        return name
  return None


def at(name, line):
  return f'{name.replace(".", "/")}.py:{line}'


def is_method(name):
  """Whether a module is a method's file."""
  folder, _, stem = name.rpartition('.')
  return stem != '__init__' and (folder == COMPRESSORS or folder.startswith(f'{REDUCERS}.'))


def is_registry(name):
  """Whether a module is where methods are listed by name."""
  return name.endswith('.__init__') and name.startswith((REDUCERS, COMPRESSORS))


def is_test(name):
  return name.startswith('tests.')


def test_no_import_runs_back_up():
  rooms = {name.split('.')[0] for name in modules()} - {'tests'}
  assert rooms == BELOW.keys(), 'BELOW lists every room of the root'
  graphlib.TopologicalSorter(BELOW).prepare()  # Raises where rooms stand on each other.
  found = [f'{at(name, line)} imports {other}: {room} may import {sorted(BELOW[room]) or "none"}'
           for name, line, other in imports() if (room := name.split('.')[0]) != 'tests'
           and other.split('.')[0] not in {room, *BELOW[room]}]
  assert not found, '\n'.join(found)


def test_no_circle_at_the_top_or_inside_a_folder():
  folders = collections.defaultdict(lambda: collections.defaultdict(dict))
  for name, line, other in imports():
    here, there = name.split('.'), other.split('.')
    depth = next((i for i, pair in enumerate(zip(here, there, strict=False))
                  if pair[0] != pair[1]), None)
    if depth is not None:
      arrow = folders['.'.join(here[:depth])][here[depth]]
      arrow.setdefault(there[depth], f'{at(name, line)} imports {other}')
  found = []
  for folder, arrows in folders.items():
    try:
      graphlib.TopologicalSorter(arrows).prepare()
    except graphlib.CycleError as error:
      circle = error.args[1]
      found += [f'a circle inside {folder or "the root"}:',
                *(arrows[a][b] for b, a in itertools.pairwise(circle))]
  assert not found, '\n'.join(found)


def test_only_their_lists_import_methods():
  found = [f'{at(name, line)} imports the method {other}: take it from its folder\'s dict'
           for name, line, other in imports()
           if is_method(other) and not is_method(name) and not is_registry(name)
           and not is_test(name)]
  assert not found, '\n'.join(found)


def test_no_method_imports_another():
  found = [f'{at(name, line)} imports {other}: what methods share is in ops/primitives'
           for name, line, other in imports()
           if is_method(name) and (is_method(other) or is_registry(other))]
  assert not found, '\n'.join(found)


def test_methods_are_short():
  lengths = {name: tree.body[-1].end_lineno for name, tree in modules().items()
             if is_method(name) and not name.startswith(COMPRESSORS)}
  found = [f'{name} has {length} lines, more than {MOST_LINES}'
           for name, length in lengths.items() if length > MOST_LINES]
  assert lengths
  assert not found, '\n'.join(found)


def test_no_method_imports_a_host():
  found = [f'{at(name, line)} imports {other}: a method imports ops alone'
           for name, line, other in imports()
           if is_method(name) and not is_method(other) and not other.startswith('ops.')]
  assert not found, '\n'.join(found)


def test_no_host_names_a_method():
  names = {key.value for name, tree in modules().items() if is_registry(name)
           for node in ast.walk(tree) if isinstance(node, ast.Dict) for key in node.keys
           if isinstance(key, ast.Constant)}
  assert {'tome', 'fastv', 'h2o', 'dtem'} <= names
  rooms = {'ops', 'models', 'lib', 'train', 'eval', 'winnow'}
  found = [f'{at(name, node.lineno)} names the method {node.value!r}'
           for name, tree in modules().items()
           if name.split('.')[0] in rooms and name != PUBLISHED
           and not is_registry(name) and not is_method(name)
           for node in ast.walk(tree)
           if isinstance(node, ast.Constant) and isinstance(node.value, str)
           and node.value in names - OTHER_WORDS]
  assert not found, '\n'.join(found)


def test_no_test_file_imports_a_test_file():
  found = [f'{at(name, line)} imports {other}: what tests share is in tests/helpers'
           for name, line, other in imports()
           if is_test(name) and other.split('.')[-1].startswith(('test_', 'conftest'))]
  assert not found, '\n'.join(found)


def test_no_folder_is_too_full():
  folders = collections.defaultdict(list)
  for name in modules():
    folder, _, stem = name.replace('.', '/').rpartition('/')
    if folder and stem != '__init__' and not folder.startswith(UNBOUNDED):
      folders[folder].append(f'{stem}.py')
  found = [f'{folder} holds {len(files)} files, at most {MOST_FILES}: {", ".join(sorted(files))}'
           for folder, files in folders.items() if len(files) > MOST_FILES]
  assert not found, '\n'.join(found)


def test_every_file_is_named_for_what_it_holds():
  found = [f'{at(name, 1)}: "{part}" says nothing of what is in it' for name in modules()
           for part in name.removeprefix('tests.helpers').split('.') if part in SAYS_NOTHING]
  assert not found, '\n'.join(found)
