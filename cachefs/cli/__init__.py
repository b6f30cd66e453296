"""The command line: what can be done with a cache without a mount.

`app` is the entry: it knows the commands, and turns every error into one or two lines and an exit code. The node
side (`cachefs_sidecar.cli`) adds its commands to the same app, and tells the others what is mounted (`mounted`).
Commands import what they need when they run, so that `cachefs --help` is instant.
"""
