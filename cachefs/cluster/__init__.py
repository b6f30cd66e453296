"""The nodes that share what they keep: who is there, and who owns what.

`nodes` says what a member is; `membership` who is there now, from what runs the cluster (`sources`); `placement`
names the owner of an object. What each keeps is the fetcher's to decide (`fetcher/copies`, `lodging`).
"""
