"""What tests share, and what a short run leaves to a long one."""

from typing import Any

import pytest

CASE = type(pytest.param())


def mostly_long(values: Any, *, short: int = 1) -> list[Any]:
  """Marks all but the first few values of a parameter as long: one shows that it works at all."""
  cases = []
  for value in values:
    case = value if isinstance(value, CASE) else pytest.param(
        *(value if isinstance(value, tuple) else (value,)))
    if pytest.mark.long not in case.marks and short:
      short -= 1
    elif pytest.mark.long not in case.marks:
      case = pytest.param(*case.values, id=case.id, marks=[*case.marks, pytest.mark.long])
    cases.append(case)
  return cases
