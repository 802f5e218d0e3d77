"""Measures speed while training, and computes the floor that a device sets."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Device:
  """Holds a vendor's figures of one chip.

  Attributes:
    flops: dense bfloat16 operations a second, two for each multiply-accumulate.
    bandwidth: bytes a second between the chip and its memory.
    source: where the vendor says so.
  """

  flops: float
  bandwidth: float
  source: str


# Keyed by jax.Device.device_kind. NVIDIA prints 1,979 TFLOPS with sparsity, twice the dense rate.
# Google's pages have given 800 and 819 GB/s for v5e, 1,600 and 1,640 for v6e: the later is here.
_V5P = Device(459e12, 2.765e12, 'docs.cloud.google.com/tpu/docs/v5p')
DEVICES: dict[str, Device] = {
    'NVIDIA H100 80GB HBM3': Device(989.5e12, 3.35e12, 'NVIDIA H100 datasheet, SXM'),
    'NVIDIA H200': Device(989.5e12, 4.8e12, 'NVIDIA H200 datasheet, SXM'),
    'TPU v5 lite': Device(197e12, 0.8e12, 'docs.cloud.google.com/tpu/docs/v5e'),
    'TPU v5': _V5P,
    'TPU v5p': _V5P,
    'TPU v6 lite': Device(918e12, 1.6e12, 'docs.cloud.google.com/tpu/docs/v6e'),
}


def floor_seconds(macs: float, num_bytes: float, *, peak_flops: float, bandwidth: float) -> float:
  """Computes the least time for so much work: the longer of computing and of moving bytes.

  Args:
    macs: multiply-accumulates.
    num_bytes: bytes to move.
    peak_flops: operations a second, two for each multiply-accumulate.
    bandwidth: bytes a second.
  """
  return max(2 * macs / peak_flops, num_bytes / bandwidth)


def measured_flops(device: jax.Device, *, side: int = 1024) -> float:
  """Measures operations a second of a float32 product of side x side matrices, best of five."""
  square = jax.device_put(jnp.ones((side, side), jnp.float32), device)
  product = jax.jit(jnp.matmul)
  product(square, square).block_until_ready()
  seconds = []
  for _ in range(5):
    start = time.perf_counter()
    product(square, square).block_until_ready()
    seconds.append(time.perf_counter() - start)
  return 2 * side ** 3 / min(seconds)


class Meter:
  """Measures training speed, and how much of the devices' peak it uses."""

  def __init__(self, slots: int, *, batch_size: int, device: jax.Device, devices: int,
               clock: Callable[[], float] = time.perf_counter):
    """Starts the clock.

    Args:
      slots: tokens that an example starts with.
      batch_size: examples a step, over all devices.
      device, devices: one of them, and how many there are.
      clock: seconds.
    """
    self._clock, self._start, self._idle = clock, clock(), 0.0
    self._batch_size, self._slots = batch_size, slots
    figures = DEVICES.get(device.device_kind)
    self._peak = devices * (figures.flops if figures else measured_flops(device))
    self._last: tuple[int, float] | None = None

  @property
  def seconds(self) -> float:
    """Seconds of wall-clock time since the meter was made, pauses left out."""
    return self._clock() - self._start - self._idle

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Leaves out what happens inside: evaluation, checkpoints."""
    begin = self._clock()
    yield
    self._idle += self._clock() - begin

  def lap(self, step: int, *, kept: float, macs: float) -> dict[str, float]:
    """Returns rates since the lap before; the first lap, which compiles, gives none.

    Args:
      step: steps done.
      kept: tokens that the model ends with, on average.
      macs: multiply-accumulates of an example in training, forward and backward.

    Returns:
      'kept_ratio' of the tokens that it starts with; 'steps_per_second', 'examples_per_second',
      'tokens_per_second' (of those that it starts with); and 'mfu', the share of the peak that the
      model's own products take (not among them: recomputation, the method's scores, the
      optimizer). The peak is the vendor's for bfloat16, or where `DEVICES` has none (a CPU), the
      speed of a large float32 product, measured when the meter was made.
    """
    now, last = self.seconds, self._last
    self._last = step, now
    rates = {'kept_ratio': kept / self._slots}
    if last is not None:
      steps_per_second = (step - last[0]) / (now - last[1])
      examples_per_second = steps_per_second * self._batch_size
      rates |= {'steps_per_second': steps_per_second, 'examples_per_second': examples_per_second,
                'tokens_per_second': examples_per_second * self._slots,
                'mfu': 2 * macs * examples_per_second / self._peak}
    return rates
