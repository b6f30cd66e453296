"""Long work on a whole dataset, cut into tasks that processes of this machine or workers of a Dask cluster do.

`index` lists names into a catalog, `seal` puts every entry's content key into it, `everywhere` warms the caches of all
nodes. Each runs on one node, hands out tasks of about a thousand objects (`tasks`) through an engine (`local`,
`dask_engine`), and keeps what comes back. `worker` is the other end. What travels is bytes that are read as MessagePack
of a known shape; nothing of ours is pickled, though Dask pickles what it sends between its own processes.
"""
