"""Articles of Wikipedia as plain prose, from the XML that the encyclopedia is published as."""

from __future__ import annotations

import bz2
import pathlib
import re
from pydoc_data.topics import topics
from xml.etree import ElementTree

# Innermost first, over and over: templates and pictures hold others.
_TEMPLATE = re.compile(r'\{\{[^{}]*\}\}')
_TABLE = re.compile(r'\{\|(?:(?!\{\|).)*?\|\}', re.DOTALL)
_PICTURE = re.compile(r'\[\[(?:File|Image|Category|[a-z-]{2,12}):(?:[^\[\]]|\[\[[^\[\]]*\]\])*\]\]')
_GONE = re.compile(r'<!--.*?-->|<ref[^<>]*/>|<(ref|math|gallery|source|code|timeline|imagemap)\b'
                   r'[^>]*>.*?</\1>', re.DOTALL)
_TAG = re.compile(r'<[^<>]*>')
_LINK = re.compile(r'\[\[(?:[^\[\]|]*\|)?([^\[\]|]*)\]\]')
_OUTSIDE = re.compile(r'\[(?:https?|ftp)://\S*\s?([^\]]*)\]')
# A paragraph that is shorter, or begins otherwise, is a heading, a list or what a table left.
_LEAST = 80


def articles(folder: pathlib.Path) -> list[str]:
  """Reads the articles of the first .bz2 file of a folder, paragraphs of prose a line each.

  Raises:
    ValueError: there is none, or it is damaged.
  """
  found = sorted(folder.glob('*.bz2'))
  if not found:
    raise ValueError(f'there is no .bz2 file in {folder}: `python -m tools.real.fetch` fetches it')
  texts = []
  try:
    with bz2.open(found[0]) as stream:
      for _, element in ElementTree.iterparse(stream):
        if element.tag.endswith('}text'):
          texts.append(element.text or '')
          element.clear()
  except (OSError, EOFError, ElementTree.ParseError) as error:
    raise ValueError(f'{found[0]} cannot be read as XML under bzip2 ({error}): fetch it '
                     'again') from error
  return [prose for text in texts if not text.upper().startswith('#REDIRECT')
          and (prose := plain(text))]


def plain(text: str) -> str:
  """Returns the prose of a page in wiki markup."""
  text = _GONE.sub('', text)
  for pattern in (_TEMPLATE, _TABLE, _PICTURE):
    count = 1
    while count:
      text, count = pattern.subn('', text)
  text = _OUTSIDE.sub(r'\1', _LINK.sub(r'\1', _TAG.sub('', text)))
  text = re.sub(r"'{2,}", '', text).replace('&nbsp;', ' ').replace('&ndash;', '–')
  lines = (re.sub(r'\s+', ' ', line).strip() for line in text.splitlines())
  return '\n'.join(line for line in lines if len(line) >= _LEAST and line[0] not in '=*#:;|!{}[')


def reference_topics() -> list[str]:
  """Returns the topics of Python's reference that this interpreter comes with."""
  return list(topics.values())
