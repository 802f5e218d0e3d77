"""What every reduction declares: a frozen dataclass, or a Flax module, with these attributes."""

from __future__ import annotations


class Reducer:
  """Defaults of a method; a method states only where it differs.

  A method is called as `method(tokens, signals, keep=M)` with M a static int, and answers an
  Assignment (ops/tokens.py). A method with parameters is a Flax module with this class beside it.

  Attributes:
    needs: names of `Signals` fields that it reads.
    site: where it acts unless a config says otherwise: 'before', 'inside', 'between' or 'after'.
    proportional: whether attention should count a slot as many times as it has tokens.
    extra_slots: slots it makes beside those it keeps (a fused token).
    conserves: '' if every original token stays in some slot, else why not.
    adaptive: '' if every slot it leaves is filled, else what decides how many are.
  """

  needs: frozenset[str] = frozenset()
  site: str = 'between'
  proportional: bool = False
  extra_slots: int = 0
  conserves: str = ''
  adaptive: str = ''

  @property
  def joins(self) -> bool:
    """Whether its outputs are made of several slots (Merge, Mix) rather than picked (Gather).

    Decides what a cut inside attention costs. Who only picks loses tokens, so the default follows
    from `conserves`; a method that joins and yet loses some says `joins = True`.
    """
    return not self.conserves

  def fewest(self, slots: int, protected: int) -> int:
    """Fewest slots it can leave of `slots`, the protected ones included."""
    del slots
    return protected + self.extra_slots + 1
