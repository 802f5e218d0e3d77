"""PyLate's pooling of a document's vectors, asked by tools/peers/pylate.py.

Axes: B documents, N vectors of one, M clusters, D features.
"""

from __future__ import annotations

import importlib.metadata

import numpy as np
import torch
from pylate.models import ColBERT
from scipy.cluster import hierarchy
from serving import serve


class Documents:
  """Holds vectors of documents, the first of each protected."""

  def load(self, path: str, threads: int) -> None:
    """Loads float32[B, N, D]."""
    torch.set_num_threads(threads)
    self.vectors = list(torch.from_numpy(np.load(path)))

  def pool(self, factor: int, out: str) -> None:
    """Writes what stands for the documents, float32[B, 1 + M, D]."""
    np.save(out, torch.stack(self._pooled(factor, len(self.vectors))).numpy())

  def run(self, factor: int, count: int) -> None:
    """Pools the first documents."""
    self._pooled(factor, count)

  def clusters(self, factor: int, linkage: str) -> list[list[int]]:
    """Returns the cluster of each vector behind the protected one, [B][N - 1]."""
    found = []
    for vectors in self.vectors:
      rest = vectors[1:]
      distances = 1 - (rest @ rest.T).numpy()
      tree = hierarchy.linkage(distances[np.triu_indices(len(rest), k=1)], method=linkage)
      found.append(hierarchy.fcluster(tree, t=len(rest) // factor, criterion='maxclust').tolist())
    return found

  def _pooled(self, factor: int, count: int) -> list[torch.Tensor]:
    # The method reads nothing of the model that it belongs to.
    return ColBERT.pool_embeddings_hierarchical(
        None, self.vectors[:count], pool_factor=factor, protected_tokens=1)


if __name__ == '__main__':
  documents = Documents()
  serve({name: importlib.metadata.version(name) for name in ('pylate', 'scipy', 'torch')},
        {name: getattr(documents, name) for name in ('load', 'pool', 'run', 'clusters')})
