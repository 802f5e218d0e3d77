"""Every test runs on CPU, under strict shapes; warnings are errors (pyproject.toml)."""

import gc
import os

import jaxlib.version

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
# Compiling is most of the time these tests take; a good part of it is optimising what runs once.
# The older emitters compile these small programs in two thirds of the time; newer XLA lacks them.
os.environ['XLA_FLAGS'] = ' '.join((
    os.environ.get('XLA_FLAGS', ''), '--xla_backend_optimization_level=0',
    '--xla_llvm_disable_expensive_passes=true', '--xla_cpu_parallel_codegen_split_count=1',
    *['--xla_cpu_use_fusion_emitters=false'] * (jaxlib.version.__version_info__ < (0, 11))))

import hypothesis
import jax
import pytest

from lib import programs

jax.config.update('jax_numpy_rank_promotion', 'raise')
# Lowering is quicker without the stack of every operation.
jax.config.update('jax_include_full_tracebacks_in_locations', False)
jax.config.update('jax_traceback_in_locations_limit', 0)
# The same examples every time; compiling makes the first one slow.
hypothesis.settings.register_profile('here', derandomize=True, deadline=None, max_examples=25)
hypothesis.settings.load_profile('here')

# Tracing makes objects by the million, of which few are ever garbage: looking for that between
# them was a quarter of the time.
gc.set_threshold(50_000, 20, 50)


def pytest_collection_finish():
  """Lets the collector pass over modules and tests, which stay to the end."""
  gc.collect()
  gc.freeze()


@pytest.fixture
def trace_for(monkeypatch):
  """A function that has what is traced from then on take the forms of another platform: 'tpu'."""
  def trace(platform):
    monkeypatch.setattr(jax.lax, 'platform_dependent', lambda *args, default, **forms:
                        forms.get(platform, default)(*args))

  return trace


@pytest.fixture(autouse=True, scope='module')
def few_programs():
  """Lets compiled programs go when they are many, module by module."""
  yield
  programs.let_go(0.3)


def pytest_terminal_summary(terminalreporter):
  """Prints methods by invariants (tests/contract/test_contract.py) and by backbones, and why
  not."""
  for title in ('contract', 'backbones'):
    _print_table(terminalreporter, title)
  _print_parity(terminalreporter)


def _print_parity(terminalreporter):
  rows = [dict(report.user_properties)['parity'] for outcome in ('passed', 'failed')
          for report in terminalreporter.stats.get(outcome, [])
          if 'parity' in dict(report.user_properties)]
  width = 2 + max([22, *(len(row[0]) for row in rows)])
  if rows:
    head = f'{"parity, max error":{width}}{"layout":22}{"layers":>10}{"outputs":>10}'
    terminalreporter.write_line(head)
  for name, layout, hidden, ends in sorted(rows):
    terminalreporter.write_line(f'{name:{width}}{layout:22}{hidden:10.1e}{ends:10.1e}')


def _print_table(terminalreporter, title):
  found, cells, reasons = [], {}, {}
  for outcome in ('passed', 'failed'):
    for report in terminalreporter.stats.get(outcome, []):
      noted = dict(report.user_properties)
      if title in noted:
        found.append((*noted[title], outcome, noted.get('reason', '')))
  if not found:
    return
  # Several workers report in any order; each pair carries its number.
  for _, column, name, outcome, reason in sorted(found):
    mark = 'ok' if outcome == 'passed' else 'FAIL'
    if reason:
      mark = f'({reasons.setdefault(reason, len(reasons) + 1)})'
    cells[column, name] = mark
  columns, rows = (dict.fromkeys(part) for part in zip(*cells, strict=True))
  left = max(map(len, (title, *rows))) + 1
  write = terminalreporter.write_line
  write(title.ljust(left) + ' '.join(columns))
  for name in rows:
    write(name.ljust(left) + ' '.join(
        cells.get((column, name), '').ljust(len(column)) for column in columns).rstrip())
  for reason, number in reasons.items():
    write(f'({number}) {reason}')
