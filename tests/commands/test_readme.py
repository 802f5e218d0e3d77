"""README.md holds the tables that its generator writes, and they link to files that exist."""

import pathlib
import re

import pytest

from tools import readme_table

ROOT = pathlib.Path(__file__).parents[2]
README = ROOT / 'README.md'


def test_the_tables_equal_their_generators():
  text = README.read_text()
  assert readme_table.updated(text) == text


@pytest.mark.parametrize('name', ['README.md', 'CONTRIBUTING.md'])
def test_relative_links_lead_to_files(name):
  text = (ROOT / name).read_text()
  targets = re.findall(r'\]\((?!https?://|#)([^)#\s]+)', text)
  assert not [target for target in targets if not (ROOT / target).exists()]


def test_a_table_without_its_markers_is_an_error():
  with pytest.raises(ValueError, match=r'README\.md has no place for its table of methods: put'):
    readme_table.updated('no markers')
