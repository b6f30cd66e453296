"""The process that owns a cache: it alone fetches, stores, indexes and evicts.

`service` takes requests from readers; `objects` makes bytes readable (one flight per object); `large` does so by
block; `capacity`, `residency` (across datasets) and `following` (within one, by `turnover`) say what may stay; `index`
remembers which version of which object has which content key; `jobs` is the long work (listing, warming, evicting,
verifying).
"""
