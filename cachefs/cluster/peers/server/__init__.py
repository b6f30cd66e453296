"""The process that gives peers what this node has: it reads the cache, and asks the fetcher for the rest.

`serving` takes connections and answers requests, within `limits`; `blobs` finds what is asked for on disk, `asking`
through the fetcher; `sending` puts it on the wire. It writes nothing, and a request of a peer is never passed on to a
third node.
"""
