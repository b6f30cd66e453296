"""The numbers of <linux/fuse.h>, under its names without FUSE_, and the few of our own that belong beside them."""

from __future__ import annotations

from enum import IntEnum, IntFlag

# The dialect spoken: 7.31 (Linux 5.4) has MAX_PAGES, NO_OPEN_SUPPORT and NO_OPENDIR_SUPPORT, which the open-free
# mode stands on. 7.40 (Linux 6.9) brought RESEND; the kernel speaks the lower of its minor and ours.
MAJOR = 7
OLDEST_MINOR = 31
MINOR = 40

# A request that was sent again after a worker died (FUSE_NOTIFY_RESEND) has this bit in its `unique`; the reply
# carries it too.
UNIQUE_RESEND = 1 << 63

# The inode number of the root of every FUSE mount (FUSE_ROOT_ID).
ROOT = 1

# The longest name Linux file systems have; the kernel itself would let 1024 bytes through to us.
NAME_MAX = 255

S_IFDIR = 0o040000
S_IFREG = 0o100000

# The block in which local file systems allocate, and what `stat` is told to read by. `du` and the totals of
# `ls -l` then agree with a copy of the tree on ext4 or xfs.
BLOCK = 4096


class Opcode(IntEnum):
    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    READLINK = 5
    SYMLINK = 6
    MKNOD = 8
    MKDIR = 9
    UNLINK = 10
    RMDIR = 11
    RENAME = 12
    LINK = 13
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    SETXATTR = 21
    GETXATTR = 22
    LISTXATTR = 23
    REMOVEXATTR = 24
    FLUSH = 25
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    FSYNCDIR = 30
    GETLK = 31
    SETLK = 32
    SETLKW = 33
    ACCESS = 34
    CREATE = 35
    INTERRUPT = 36
    BMAP = 37
    DESTROY = 38
    IOCTL = 39
    POLL = 40
    NOTIFY_REPLY = 41
    BATCH_FORGET = 42
    FALLOCATE = 43
    READDIRPLUS = 44
    RENAME2 = 45
    LSEEK = 46
    COPY_FILE_RANGE = 47
    SETUPMAPPING = 48
    REMOVEMAPPING = 49
    SYNCFS = 50
    TMPFILE = 51
    STATX = 52
    COPY_FILE_RANGE_64 = 53


# Nobody waits for an answer to these; one with their number would be an error, or end another request.
UNANSWERED = frozenset({Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.INTERRUPT, Opcode.NOTIFY_REPLY})


class Notify(IntEnum):
    INVAL_INODE = 2
    INVAL_ENTRY = 3
    RESEND = 7


class Init(IntFlag):
    """Flags of INIT. Those that are asked for: see negotiation.py. The others are here for logs."""

    ASYNC_READ = 1 << 0
    POSIX_LOCKS = 1 << 1
    FILE_OPS = 1 << 2
    ATOMIC_O_TRUNC = 1 << 3
    EXPORT_SUPPORT = 1 << 4
    BIG_WRITES = 1 << 5
    DONT_MASK = 1 << 6
    SPLICE_WRITE = 1 << 7
    SPLICE_MOVE = 1 << 8
    SPLICE_READ = 1 << 9
    FLOCK_LOCKS = 1 << 10
    HAS_IOCTL_DIR = 1 << 11
    AUTO_INVAL_DATA = 1 << 12
    DO_READDIRPLUS = 1 << 13
    READDIRPLUS_AUTO = 1 << 14
    ASYNC_DIO = 1 << 15
    WRITEBACK_CACHE = 1 << 16
    NO_OPEN_SUPPORT = 1 << 17
    PARALLEL_DIROPS = 1 << 18
    HANDLE_KILLPRIV = 1 << 19
    POSIX_ACL = 1 << 20
    ABORT_ERROR = 1 << 21
    MAX_PAGES = 1 << 22
    CACHE_SYMLINKS = 1 << 23
    NO_OPENDIR_SUPPORT = 1 << 24
    EXPLICIT_INVAL_DATA = 1 << 25
    MAP_ALIGNMENT = 1 << 26
    SUBMOUNTS = 1 << 27
    HANDLE_KILLPRIV_V2 = 1 << 28
    SETXATTR_EXT = 1 << 29
    INIT_EXT = 1 << 30
    INIT_RESERVED = 1 << 31
    SECURITY_CTX = 1 << 32
    HAS_INODE_DAX = 1 << 33
    CREATE_SUPP_GROUP = 1 << 34
    HAS_EXPIRE_ONLY = 1 << 35
    DIRECT_IO_ALLOW_MMAP = 1 << 36
    PASSTHROUGH = 1 << 37
    NO_EXPORT_SUPPORT = 1 << 38
    HAS_RESEND = 1 << 39
    ALLOW_IDMAP = 1 << 40
    OVER_IO_URING = 1 << 41
    REQUEST_TIMEOUT = 1 << 42


class Open(IntFlag):
    """Flags of the reply to OPEN and OPENDIR."""

    DIRECT_IO = 1 << 0
    KEEP_CACHE = 1 << 1
    NONSEEKABLE = 1 << 2
    CACHE_DIR = 1 << 3
    STREAM = 1 << 4
    NOFLUSH = 1 << 5
    PARALLEL_DIRECT_WRITES = 1 << 6
    PASSTHROUGH = 1 << 7


def opcode_name(opcode: int) -> str:
    """The name in <linux/fuse.h>, or "opcode <n>" of a newer kernel."""
    try:
        return Opcode(opcode).name
    except ValueError:
        return f"opcode {opcode}"


def flag_names(kind: type[IntFlag], flags: int) -> str:
    """`A|B`, with what has no name in `kind` as a number at the end; "0" when none is set."""
    names = [str(flag.name) for flag in kind if flags & flag]
    rest = flags & ~sum(kind)
    return "|".join([*names, hex(rest)] if rest else names) or "0"
