"""Bytes of objects from one node of a cluster to another.

`Peers` is the side that asks (the fetcher), `cachefs.cluster.peers.server` the side that answers, in a process of its
own. Between them: `wire` is what they say, `trust` why they believe each other, `channel` the socket.
"""
