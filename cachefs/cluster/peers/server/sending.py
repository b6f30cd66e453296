"""Frames on their way to one peer: from files to a socket, in a thread.

In a thread, because a file may have to come from the disk, which no loop may wait for. A thread never waits for a peer
longer than PATIENCE_MS, so a few of them serve any number of slow peers; waiting is the loop's work.

Small objects go together in one frame (`framing`). Where there is no TLS, the kernel copies files whose digest and tag
are known to the socket by itself (sendfile); others are read here, and so compared with their digest before they leave.
"""

from __future__ import annotations

import os
import select
import socket
import ssl
from collections import deque
from collections.abc import Callable
from enum import Enum

from cachefs.cluster.peers.server.blobs import Piece
from cachefs.cluster.peers.server.framing import Damaged, Frame
from cachefs.cluster.peers.trust import Session
from cachefs.cluster.peers.wire import MOST_BYTES, NO_INDEX, Status, pack_entry

# About what it costs to hand the sending over to the loop and back, many times over.
PATIENCE_MS = 20

# A turn of one answer; then another one may go first. Of what nobody waits for less, as all threads may be at it.
TURN_BYTES = 32 * 1024 * 1024
PREFETCH_TURN_BYTES = 4 * 1024 * 1024


class Sent(Enum):
    """ALL: nothing is left. SOME: it was its turn for long enough. BLOCKED: the peer takes nothing now."""

    ALL = 0
    SOME = 1
    BLOCKED = 2


class Outbox:
    """Owns the pieces that were put into it. `pump` runs in one thread at a time, and the rest when none runs.

    find: opens the piece for an item when its turn comes; None = it is not stored. missing: those items. damaged: items
    whose bytes are not what was stored. sent: bytes of objects, at most `most`. turn: bytes that `pump` sends before it
    lets others go first. resident: `pump` waits for nothing, so that it may run on the loop, and raises BlockingIOError
    where it would have to wait for a disk. ended: END was said. stop: set to end `pump` soon.
    """

    def __init__(
        self,
        sock: socket.socket,
        session: Session,
        find: Callable[[int], Piece | None],
        *,
        most: int = MOST_BYTES,
        turn: int = TURN_BYTES,
        resident: bool = False,
    ) -> None:
        self._sock = sock
        self._session = session
        self._find = find
        self._most = most
        self._turn = turn
        direct = not (resident or isinstance(sock, ssl.SSLSocket))
        self._frame = Frame(session, direct=direct, resident=resident)
        self._resident = resident
        self._queue: deque[int | Piece | bytes] = deque()
        self._head: memoryview = memoryview(b"")
        self._bodies: deque[Piece] = deque()  # follow the head from their files
        self._poll = select.poll()
        self._poll.register(sock.fileno(), select.POLLOUT)
        self.missing: list[int] = []
        self.damaged: list[int] = []
        self.sent = 0
        self._ending = self.ended = False
        self.stop = False

    def look_for(self, items: range) -> None:
        """Send what is stored of these."""
        self._queue.extend(items)

    def put(self, piece: Piece) -> None:
        self._queue.append(piece)

    def say(self, status: Status, index: int = NO_INDEX, *, size: int = -1) -> None:
        """An entry without bytes."""
        self._queue.append(pack_entry(status, index, size=size))

    def end_if_complete(self) -> None:
        """Say END after what is in the queue now, if all of it could be sent: that saves a turn of a thread."""
        self._ending = True

    @property
    def unsent(self) -> bool:
        """Whether a frame was begun that the peer has not taken all of."""
        return bool(self._head or self._bodies)

    def close(self) -> None:
        """Nothing more is sent. Called when no thread sends."""
        for piece in (*self._queue, *self._bodies):
            if isinstance(piece, Piece):
                piece.close()
        self._queue.clear()
        self._bodies.clear()
        self._head = memoryview(b"")
        self._frame.close()

    def pump(self) -> Sent:
        """Send what there is, for as long as the peer takes it. Raises OSError."""
        turn = self._turn
        while not self.stop:
            if not self._head and not self._bodies:
                if turn <= 0:
                    return Sent.SOME
                if not self._begin():
                    return Sent.ALL
            try:
                turn -= self._push()
            except (BlockingIOError, ssl.SSLWantWriteError, ssl.SSLWantReadError):
                if not self._poll.poll(0 if self._resident else PATIENCE_MS):
                    return Sent.BLOCKED
        return Sent.ALL

    def _begin(self) -> bool:
        """Make the next frame of what is in the queue. False: there is nothing to send."""
        frame = self._frame
        frame.clear()
        while self._queue or self._may_end():
            next = self._queue.popleft()
            if isinstance(next, int):
                piece = self._find(next)
                if piece is None:
                    self.missing.append(next)
                    continue
                next = piece
            if not frame.has_room(next):
                self._queue.appendleft(next)
                break
            if isinstance(next, Piece):
                self._add(frame, next)
            else:
                frame.add(next)
        if not frame.entries:
            return False
        self._head = frame.sealed()
        self._bodies.extend(frame.bodies)
        return True

    def _may_end(self) -> bool:
        if not self._ending:
            return False
        self._ending = False
        self.ended = not self.missing and not self.damaged
        if self.ended:
            self.say(Status.END)
        return self.ended

    def _add(self, frame: Frame, piece: Piece) -> None:
        try:
            if self.sent + piece.length > self._most:
                frame.add(pack_entry(Status.REFUSED, piece.index))
            elif piece.large:
                frame.add(pack_entry(Status.LARGE, piece.index, size=piece.size, key=piece.key))
            else:
                frame.add_bytes(piece)
                self.sent += piece.length
        except Damaged:
            if self._resident:
                raise BlockingIOError from None  # a thread finds that out, too, and what is to be done takes longer
            self.damaged.append(piece.index)
        finally:
            if not frame.owns(piece):
                piece.close()

    def _push(self) -> int:
        """Send some; how many bytes."""
        if self._head:
            # With what follows in one packet.
            count = self._sock.send(self._head, socket.MSG_MORE) if self._bodies else self._sock.send(self._head)
            self._head = self._head[count:]
            return count
        body = self._bodies[0]
        count = os.sendfile(self._sock.fileno(), body.fd, body.at, body.length) if body.length else 0
        if not count and body.length:
            raise ConnectionAbortedError("the file became shorter while it was sent")
        body.at += count
        body.length -= count
        if not body.length:
            self._bodies.popleft().close()
        return count
