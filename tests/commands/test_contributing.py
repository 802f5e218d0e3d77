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


def test_the_printed_method_needs_no_other_edit(tmp_path):
  copy = tmp_path / 'copy'
  shutil.copytree(ROOT, copy, ignore=ignored)
  text = (ROOT / 'CONTRIBUTING.md').read_text()
  path, code = re.search(r'<!-- example: (\S+) -->\n```python\n(.*?)```', text, re.S).groups()
  line, entry = (re.search(rf'<!-- {part} -->\n```python\n(.*?)```', text, re.S)[1]
                 for part in ('import', 'entry'))
  assert len([line for line in code.splitlines() if line.strip()]) <= 40
  (copy / path).write_text(code)
  names = (copy / path).parent / '__init__.py'
  names.write_text(names.read_text().replace('from ', f'{line}from ', 1)
                   .replace(' = {\n', f' = {{\n{entry}', 1))

  def run(*command: str) -> str:
    done = subprocess.run([sys.executable, '-m', *command], cwd=copy, text=True,
                          capture_output=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout

  assert re.search(r'\d+ passed', run('pytest', 'tests/contract/test_contract.py', '-k', 'keynorm',
                                      '-p', 'no:cacheprovider'))
  run('tools.readme_table')
  row = '| [`keynorm`](ops/reducers/vision/keynorm.py) | Keeps the tokens with the shortest keys. |'
  assert row in (copy / 'README.md').read_text()
  explained = run('tools.explain', '--config=configs/digits.py',
                  '--config.reduce.vision.method=keynorm', '--config.reduce.vision.layers=(1,3)',
                  '--config.reduce.vision.keep_ratio=0.5')
  assert 'keynorm' in explained
