"""Other layers' caches than `ops.kv_cache.KV`, and the answers of methods that make them.

An answer is carried out by its own `shrink` (`ops.kv_cache.KVAnswer`); a cache appends and attends
by itself (`ops.kv_cache.LayerCache`), so that neither a model nor a block names any.
"""
