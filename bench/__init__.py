"""The numbers: cachefs beside what a user would have without it, in one run, on the same files.

`python -m bench` runs scenarios, each a question a user would ask (`scenarios/`, one file each). `stage` makes files,
an S3 server, caches and mounts and takes them away again; `readers` are the processes that read and keep the time;
`outcome` is what a scenario hands back; `report` prints and writes it; `machine` says where it ran.
"""
