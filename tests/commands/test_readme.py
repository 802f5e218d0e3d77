"""README.md holds the tables that its generator writes, links to files that exist, and examples
and commands that work."""

import dataclasses
import pathlib
import re
import shlex

import pytest
from helpers import processes

from models import families
from models.catalogue import entries, every_method, why_not
from models.plans.methods import make_method
from models.plans.needs import check_needs
from ops.reducers.cache import CACHE_REDUCERS
from ops.signals import NEXT_LAYER
from tools import readme_table

ROOT = pathlib.Path(__file__).parents[2]
README = ROOT / 'README.md'
# A command's own reading of its flags, without what it then does. --config is read with them.
READ_FLAGS = """
import runpy, sys
from absl import flags
from lib.runtime import cli
cli.run = lambda main: flags.FLAGS(sys.argv)
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name='__main__')
"""


def blocks(language):
  """The code blocks of README.md in a language, '' for commands."""
  found = re.findall(r'^```(\w*)\n(.*?)^```$', README.read_text(), re.M | re.S)
  return [text for name, text in found if name == language]


def commands():
  """Every `python -m` of README.md, in its blocks and in its lines, that names its flags."""
  text = README.read_text()
  lines = '\n'.join(block.replace('\\\n', ' ') for block in blocks('')).splitlines()
  lines += re.findall(r'`(python -m [^`]+)`', text)
  found = [shlex.split(line.partition('python -m ')[2]) for line in lines if 'python -m ' in line]
  return [command for command in found if len(command) > 1]


def shown_flags():
  """Flags of README.md's tables, which are for training an image model, as one command."""
  flags = re.findall(r'^\| (?:[^|`]+ \| )?`(--config\.[^`]+)` \|', README.read_text(), re.M)
  return ['train', '--config=configs/digits.py', '--workdir=runs/mine',
          *shlex.split(' '.join(flags))]


@pytest.mark.parametrize('file', readme_table.TABLES)
def test_the_tables_equal_their_generators(file):
  text = (ROOT / file).read_text()
  assert readme_table.updated(text, file) == text


def test_what_the_table_of_hosts_says_is_what_plans_say():
  """Both ways: what may act there can be planned, and what may not cannot."""
  for title, (host, place) in readme_table.hosts().items():
    offers = host.offers - NEXT_LAYER - {'attention'} if place == 'cache' else host.offers
    host = dataclasses.replace(host, offers=offers)
    for name, method in every_method().items():
      made = make_method(name, {}, {**CACHE_REDUCERS, name: method})
      if (made.site == 'cache') != (place == 'cache') or made.kind == 'insert' or (
          made.site == 'branch' and place == 'projector'):
        assert why_not(name, host, place) or made.kind == 'insert'
        continue
      site = 'after' if place == 'projector' else made.site
      try:
        check_needs(name, made, host, site, made.parts if site == 'branch' else '')
      except ValueError:
        able = False
      else:
        able = True
      assert able == (not why_not(name, host, place)), (title, name)


# What a docstring says of a method that is not made from its authors' code.
UNRELEASED = re.compile(r"no code|no release|abstract|from the paper's text|is not reproduced here")


def test_methods_without_a_release_are_marked():
  text, listed = README.read_text(), entries()
  for name, method in every_method().items():
    said = ' '.join(method.__doc__.split())
    assert bool(listed[name].reconstructed) == bool(UNRELEASED.search(said)), name
    row, = re.findall(rf'^\| \[`{name}`\]\(.*$', text, re.M)
    assert (' † |' in row) == bool(listed[name].reconstructed), name
  assert text.count('†') == 1 + sum(bool(entry.reconstructed) for entry in listed.values())


@pytest.mark.parametrize('name', ['README.md', 'METHODS.md', 'CONTRIBUTING.md', 'CHANGELOG.md',
                                  'results/README.md'])
def test_relative_links_lead_to_files(name):
  file = ROOT / name
  targets = re.findall(r'(?:\]\(|src=")(?!https?://|#)([^)#"\s]+)', file.read_text())
  assert not [target for target in targets if not (file.parent / target).exists()]


def test_links_within_lead_to_headings():
  text = README.read_text()
  headings = {heading.lower().replace(' ', '-') for heading in re.findall(r'^## (.+)$', text, re.M)}
  assert set(re.findall(r'\]\(#([^)]+)\)', text)) <= headings


def test_a_table_without_its_markers_is_an_error():
  with pytest.raises(ValueError, match=r'README\.md has no place for its table of methods: put'):
    readme_table.updated('no markers')


def test_every_backbone_belongs_to_a_family(monkeypatch):
  table = readme_table.backbones_table()
  for name in families.NAMED | families.PAIRS | families.LMS | families.VLMS:
    assert f'`{name}`' in table
  monkeypatch.setitem(families.LMS, 'other_7b', {})
  with pytest.raises(ValueError, match=r'other_7b of models/families\.py is in no family'):
    readme_table.backbones_table()


@pytest.mark.parametrize(('file', 'names', 'backbone'), [
    ('test_parity.py', 'LAYERS, OUTPUTS', 'vit.py'),
    ('test_parity.py', 'LAYERS, OUTPUTS', 'clip.py'),
    ('test_parity_vlm.py', 'LAYERS, LOGITS', 'vlm.py'),
    ('test_parity_lm.py', 'TOLERANCE', 'lm.py')])
def test_errors_are_those_of_the_parity_tests(file, names, backbone):
  text = (ROOT / 'tests' / 'models' / file).read_text()
  bounds = re.search(rf'^{names} = (.+)$', text, re.M)[1].split(', ')
  wanted = bounds if len(bounds) == 2 else bounds * 2
  found = {family.errors for family in readme_table.FAMILIES if family.file == backbone}
  assert found == {', '.join(wanted)}


def test_the_first_example_runs_and_prints_what_it_says():
  example = blocks('python')[0]
  assert len(example.splitlines()) <= 10
  done = processes.run('-c', example)
  assert done.returncode == 0, done.stderr
  printed = done.stdout.splitlines()
  assert printed[0] == '(2, 98, 384)'
  assert printed[1] == '196.0'
  assert f'# {printed[0]}' in example
  assert f'# {printed[1]}:' in example
  assert re.fullmatch(r'\[(\s*\d+){4}\]', printed[2])


@pytest.mark.long
def test_the_other_example_runs():
  _, example, _ = blocks('python')
  done = processes.run('-c', example)
  assert done.returncode == 0, done.stderr
  assert 'fastv (before) in layer 2: 64 to 32 tokens' in done.stdout


@pytest.mark.long
def test_a_projector_in_front_of_a_frozen_model_gets_a_gradient():
  *_, example = blocks('python')
  # With numbers to see: what is asked of the gradient is that it is not zero.
  done = processes.run('-c', example.replace('.shape)', '.any())'))
  assert done.returncode == 0, done.stderr
  assert done.stdout.strip() == 'True'


def test_commands_and_flags_are_found():
  modules = [command[0] for command in commands()]
  assert {'train', 'eval', 'tools.explain', 'tools.generate', 'tools.pack'} <= set(modules)
  assert len(shown_flags()) >= 14


@pytest.mark.long
@pytest.mark.parametrize('command', [*commands(), shown_flags()], ids=' '.join)
def test_every_flag_that_is_shown_exists(command):
  done = processes.run('-c', READ_FLAGS, *command)
  assert done.returncode == 0, done.stderr[-1000:]
