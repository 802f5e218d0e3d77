"""What an error says."""

import pytest


def said(call, *args, **keywords):
  """The one line of a ValueError."""
  with pytest.raises(ValueError, match=r'\w') as caught:
    call(*args, **keywords)
  assert '\n' not in str(caught.value)
  return str(caught.value)
