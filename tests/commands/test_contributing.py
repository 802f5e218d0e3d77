"""The method of CONTRIBUTING.md works as printed, and shows up everywhere."""

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


@pytest.fixture(scope='module')
def copy(tmp_path_factory):
  """A copy of the tree with the printed methods in it, and nothing else that is new."""
  copy = tmp_path_factory.mktemp('contributing') / 'copy'
  shutil.copytree(ROOT, copy, ignore=ignored)
  text = (ROOT / 'CONTRIBUTING.md').read_text()
  examples = re.findall(r'<!-- example: (\S+) -->\n```python\n(.*?)```', text, re.S)
  line, entry = (re.search(rf'<!-- {part} -->\n```python\n(.*?)```', text, re.S)[1]
                 for part in ('import', 'entry'))
  lines = {'keynorm': (line, entry), 'fading': (
      'from ops.reducers.cache.fading import Fading\n', "    'fading': Fading,\n"), 'anchored': (
      'from ops.reducers.cache.anchored import Anchored\n', "    'anchored': Anchored,\n")}
  for path, code in examples:
    assert len([line for line in code.splitlines() if line.strip()]) <= 40
    (copy / path).write_text(code)
    line, entry = lines.pop(pathlib.Path(path).stem)
    names = (copy / path).parent / '__init__.py'
    names.write_text(names.read_text().replace('from ', f'{line}from ', 1)
                     .replace(' = {\n', f' = {{\n{entry}', 1))
  assert not lines
  return copy


def run(copy, *command: str) -> str:
  done = subprocess.run([sys.executable, '-m', *command], cwd=copy, text=True,
                        capture_output=True, check=False)
  assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
  return done.stdout


def test_the_printed_method_needs_no_other_edit(copy):
  assert re.search(r'\d+ passed', run(copy, 'pytest', 'tests/contract/test_contract.py', '-k',
                                      'keynorm', '-p', 'no:cacheprovider'))
  run(copy, 'tools.readme_table')
  row = '| [`keynorm`](ops/reducers/vision/keynorm.py) | Keeps the tokens with the shortest keys. |'
  assert row in (copy / 'README.md').read_text()
  explained = run(copy, 'tools.explain', '--config=configs/digits.py',
                  '--config.reduce.vision.method=keynorm', '--config.reduce.vision.layers=(1,3)',
                  '--config.reduce.vision.keep_ratio=0.5')
  assert 'keynorm' in explained


def test_the_printed_method_that_holds_another_needs_no_other_edit(copy):
  told = run(copy, 'pytest', 'tests/contract/test_contract_cache.py', '-k', 'anchored', '-p',
             'no:cacheprovider')
  assert int(re.search(r'(\d+) passed', told)[1]) > 7


def test_the_printed_method_that_evicts_needs_no_other_edit(copy):
  tests = ('tests/contract/test_contract_cache.py', 'tests/contract/test_living_cache.py')
  told = run(copy, 'pytest', *tests, '-k', 'fading', '-p', 'no:cacheprovider')
  assert int(re.search(r'(\d+) passed', told)[1]) > 8
