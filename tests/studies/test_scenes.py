"""What is told of a model of pretrained parts, from rows as they are measured."""

from lib.studies import scenes

ROWS = [{'set': 'emoji_scenes/one', 'reader': reader, 'reduce': {}, 'questions': 242, 'named': 0.4,
         'by': by, 'within': dict.fromkeys(by, 0.06), 'chance': {'name': 1 / 121, 'present': 0.5}}
        for reader, by in (('model', {'name': 0.25, 'present': 0.7}), ('cls', {'name': 0.24}))]


def test_tables_show_every_reader_and_kind(tmp_path):
  lines = scenes.report([*ROWS, {**ROWS[0], 'reader': 'other', 'failed': True}]).splitlines()
  assert lines[2] == '| | name | present | name, likeliest of 121 |'
  assert lines[4] == '| model | 0.250 ± 0.060 | 0.700 ± 0.060 | 0.400 |'
  assert lines[5] == '| cls | 0.240 ± 0.060 |  | 0.400 |'
  assert lines[6] == '| chance | 0.008 | 0.500 | 0.008 |'
  scenes.draw(ROWS, tmp_path / 'plot.png')
  assert (tmp_path / 'plot.png').stat().st_size > 1000
