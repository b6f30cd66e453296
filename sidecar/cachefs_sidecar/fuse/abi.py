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


class Notify(IntEnum):
    INVAL_INODE = 2
    INVAL_ENTRY = 3
    RESEND = 7


class Init(IntFlag):
    """Flags of INIT that this project offers, wants or reports."""

    ASYNC_READ = 1 << 0
    BIG_WRITES = 1 << 5
    AUTO_INVAL_DATA = 1 << 12
    DO_READDIRPLUS = 1 << 13
    READDIRPLUS_AUTO = 1 << 14
    NO_OPEN_SUPPORT = 1 << 17
    PARALLEL_DIROPS = 1 << 18
    MAX_PAGES = 1 << 22
    CACHE_SYMLINKS = 1 << 23
    NO_OPENDIR_SUPPORT = 1 << 24
    EXPLICIT_INVAL_DATA = 1 << 25
    INIT_EXT = 1 << 30
    HAS_EXPIRE_ONLY = 1 << 35
    PASSTHROUGH = 1 << 37
    HAS_RESEND = 1 << 39


class Open(IntFlag):
    """Flags of the reply to OPEN and OPENDIR."""

    KEEP_CACHE = 1 << 1
    CACHE_DIR = 1 << 3


def opcode_name(opcode: int) -> str:
    """The name in <linux/fuse.h>, or "opcode <n>" of a newer kernel."""
    try:
        return Opcode(opcode).name
    except ValueError:
        return f"opcode {opcode}"
