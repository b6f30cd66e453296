"""Which of an origin's names are served as paths, and what is said about the others.

An object store's key is any text: `a//b`, `../x`, `a` beside `a/b`. A name that a file system can show is served
byte for byte, however odd (newlines, both Unicode normal forms); any other is skipped with a reason a person
understands, so that nothing of an origin is silently missing and no name ever leads out of its directory.

A served name is a `Place`: the directory as its components joined with NUL, and the last component. NUL is in
no name, sorts before every other byte, and so keeps a directory's descendants beside it in any sorted table.
"""

from __future__ import annotations

from typing import NamedTuple

from cachefs.catalog.format import prefix_of

# The longest name of one directory entry in the Linux VFS (NAME_MAX in linux/limits.h), in bytes.
NAME_MAX = 255

EMPTY = "has an empty component (two slashes in a row, or one at the start)"
DOTS = "has a component '.' or '..'"
NUL = "contains a NUL character"
LONG = f"has a component longer than {NAME_MAX} bytes"
NOT_UTF8 = "is not valid UTF-8"
SLASH = "ends in a slash, like a directory, but has content"
BESIDE_DIRECTORY = "is an object beside a directory of the same name"
OUTSIDE = "is not below the dataset's root"
SIZE = "has a size that is not known or not possible"
VERSION = "has a version that is not valid UTF-8"

# Directories judged lately. Listings come directory by directory, so a few are enough; dropped all at once.
_REMEMBERED = 1024


class Place(NamedTuple):
    """Where an entry belongs. depth: 0 for the root, 1 for what is in it. folder: NUL-joined components."""

    depth: int
    folder: bytes
    name: bytes
    directory: bool


ROOT_PLACE = Place(0, b"", b"", True)


class Judge:
    """Decides about the names of one dataset. Not for several threads at once (it remembers directories)."""

    def __init__(self, root: str) -> None:
        self._root = root
        self._prefix = prefix_of(root)
        self._folders: dict[bytes, tuple[int, bytes] | str] = {b"": (1, b"")}

    def place(self, path: str, *, directory: bool = False, size: int = 0) -> Place | str:
        """Where the object or directory `path` (full object path) is served, or why it is not."""
        if not path.startswith(self._prefix):
            if path == self._root:
                return ROOT_PLACE if directory else BESIDE_DIRECTORY
            return OUTSIDE
        try:
            relative = path[len(self._prefix) :].encode("utf-8")
        except UnicodeEncodeError:
            return NOT_UTF8
        if path.endswith("/") or not relative:
            if size and not directory:
                return SLASH
            if not relative:
                return ROOT_PLACE
            relative, directory = relative[:-1], True
        above, _, name = relative.rpartition(b"/")
        if not above and relative[:1] in (b"", b"/"):  # "root//" and "root//a"
            return EMPTY
        folder = self._folders.get(above)
        if folder is None:
            folder = self._judge_folder(above)
        if type(folder) is str:
            return folder
        if reason := refusal(name):
            return reason
        return Place(folder[0], folder[1], name, directory)  # type: ignore[arg-type]

    def _judge_folder(self, above: bytes) -> tuple[int, bytes] | str:
        if len(self._folders) >= _REMEMBERED:
            self._folders = {b"": (1, b"")}
        parts = above.split(b"/")
        reason = next((reason for part in parts if (reason := refusal(part))), "")
        verdict = reason or (len(parts) + 1, b"\0".join(parts))
        self._folders[above] = verdict
        return verdict


def refusal(component: bytes) -> str:
    """Why this component of a name cannot be served; "" when it can."""
    if not component:
        return EMPTY
    if component in (b".", b".."):
        return DOTS
    if b"\0" in component:
        return NUL
    return LONG if len(component) > NAME_MAX else ""


def path_of(root: str, folder: bytes, name: bytes) -> bytes:
    """The full object path, as UTF-8, of an entry that was given this place."""
    below = folder.replace(b"\0", b"/") + b"/" + name if folder else name
    return prefix_of(root).encode("utf-8", "surrogatepass") + below
