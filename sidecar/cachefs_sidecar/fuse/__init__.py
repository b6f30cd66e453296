"""The mount, from the kernel's bytes to the store's: the raw FUSE protocol in Python.

`wire` knows the bytes, `negotiation` the handshake, `session` one descriptor of a connection, `tree` what is in the
mount, `listing` how a directory is read, `reading` how a cached byte is found, `reply` and `settling` how it gets to
the kernel in one copy, `misses` how a missing one is waited for, `worker` the process around them, `invalidation` what
the kernel must forget after a refresh, `tracing` what is logged of it all. `modes` says whether the kernel reads blobs
by itself, `passthrough`, `opens` and `files` how it does.
"""
