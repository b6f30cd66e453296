"""The node side of cachefs: the mount and its processes. Imports `cachefs`, never the reverse."""
