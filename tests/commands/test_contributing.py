"""The methods of CONTRIBUTING.md work as printed, and show up everywhere."""

import pathlib
import re
import shutil
import subprocess
import sys

import pytest

pytestmark = pytest.mark.long

ROOT = pathlib.Path(__file__).parents[2]
SKIP = shutil.ignore_patterns('.git', '.venv', '__pycache__', '.*_cache')


def ignored(folder, names):
  """Names what a copy does without; data sets and runs lie at the root."""
  own = {'data', 'runs'} if pathlib.Path(folder) == ROOT else set()
  return SKIP(folder, names) | own


def block(text, mark):
  """The code behind a mark."""
  return re.search(rf'<!-- {mark} -->\n```python\n(.*?)```', text, re.S)[1]


# What is said of each printed method, from its mark on.
SAID = re.split(r'(?=<!-- example: )', (ROOT / 'CONTRIBUTING.md').read_text())[1:]
PATHS = [re.match(r'<!-- example: (\S+) -->', said)[1] for said in SAID]


# Lines of a folder's dict that the text leaves to the reader.
LINES = {
    'fading': ('from ops.reducers.cache.fading import Fading\n', "    'fading': Fading,\n"),
    'anchored': ('from ops.reducers.cache.anchored import Anchored\n',
                 "    'anchored': Anchored,\n")}
# Methods whose own tests the text names.
TESTED = [(path, said) for path, said in zip(PATHS, SAID, strict=True)
          if pathlib.Path(path).stem not in LINES]


@pytest.fixture(scope='module')
def copy(tmp_path_factory):
  """The project with the printed methods, each one file and two lines of its folder's dict."""
  copy = tmp_path_factory.mktemp('project') / 'copy'
  shutil.copytree(ROOT, copy, ignore=ignored)
  for path, said in zip(PATHS, SAID, strict=True):
    code = block(said, r'example: \S+')
    assert len([line for line in code.splitlines() if line.strip()]) <= 40
    (copy / path).write_text(code)
    line, entry = LINES.get(pathlib.Path(path).stem) or (
        block(said, 'import'), block(said, 'entry'))
    names = (copy / path).parent / '__init__.py'
    names.write_text(names.read_text().replace('from ', f'{line}from ', 1)
                     .replace(' = {\n', f' = {{\n{entry}', 1))
  return copy


def run(copy, *command: str) -> str:
  done = subprocess.run([sys.executable, '-m', *command], cwd=copy, text=True,
                        capture_output=True, check=False)
  assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
  return done.stdout


@pytest.mark.parametrize(('path', 'said'), TESTED, ids=[path for path, _ in TESTED])
def test_a_printed_method_needs_no_other_edit(path, said, copy):
  tests, name = re.search(r'`python -m pytest (\S+) -k (\w+)`', said).groups()
  assert name == pathlib.Path(path).stem
  assert re.search(r'\d+ passed', run(copy, 'pytest', tests, '-k', name, '-p', 'no:cacheprovider'))


def test_printed_methods_are_listed_and_explained(copy):
  run(copy, 'tools.readme_table')
  readme = (copy / 'README.md').read_text()
  row = '| [`keynorm`](ops/reducers/vision/keynorm.py) | Keeps the tokens with the shortest keys. |'
  assert row in readme
  for path in PATHS:
    assert f'| [`{pathlib.Path(path).stem}`]({path}) |' in readme
  for name in ('keynorm', 'attention_depths'):
    explained = run(copy, 'tools.explain', '--config=configs/digits.py',
                    f'--config.reduce.vision.method={name}',
                    '--config.reduce.vision.layers=(1,3)', '--config.reduce.vision.keep_ratio=0.5')
    assert name in explained


def test_the_printed_method_that_holds_another_needs_no_other_edit(copy):
  told = run(copy, 'pytest', 'tests/contract/test_contract_cache.py', '-k', 'anchored', '-p',
             'no:cacheprovider')
  assert int(re.search(r'(\d+) passed', told)[1]) > 7


def test_the_printed_method_that_evicts_needs_no_other_edit(copy):
  tests = ('tests/contract/test_contract_cache.py', 'tests/contract/test_living_cache.py')
  told = run(copy, 'pytest', *tests, '-k', 'fading', '-p', 'no:cacheprovider')
  assert int(re.search(r'(\d+) passed', told)[1]) > 8
