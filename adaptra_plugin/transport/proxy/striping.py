"""Which rail carries what. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from adaptra_plugin.transport.proxy.health import Health, State
from adaptra_plugin.transport.proxy.outbox import Item
from adaptra_plugin.transport.proxy.tracks import Track


class Striping:
    """Chooses among the connections and by the health of a link's rails, both by name and kept up by the link."""

    def __init__(self, tracks: Mapping[str, Track], health: Mapping[str, Health]) -> None:
        self._tracks = tracks
        self._health = health

    def healthy(self, track: Track) -> bool:
        return self._health[track.rail.name].state is State.HEALTHY

    def for_small(self) -> Track | None:
        """For frames of state: the best kind of rail that works, the shortest way."""
        return min(self._tracks.values(), key=self._preference, default=None)

    def _preference(self, track: Track) -> tuple[bool, int, float]:
        return (not self.healthy(track), track.rail.kind, track.inflight / track.speed)

    def for_chunk(self, item: Item, waiting_bytes: int) -> Track | None:
        """The rail on which a chunk arrives first; None: all that are worth it have enough to do.

        `waiting_bytes`: all that waits for a rail, the chunk included."""
        tracks = self._eligible()
        if not tracks:
            return None
        if len(tracks) == 1:
            return tracks[0] if self._has_room(tracks[0], item) else None
        fastest = min(tracks, key=lambda track: track.finish_s(item.length))
        if self._has_room(fastest, item):
            return fastest
        # a slower rail only if the faster one, busy as it is, would finish all that waits later than it this chunk
        until = fastest.finish_s(waiting_bytes)
        others = [t for t in tracks if self._has_room(t, item) and t.finish_s(item.length) < until]
        return min(others, key=lambda track: track.finish_s(item.length), default=None)

    def _eligible(self) -> list[Track]:
        """Rails for data: the healthy ones of the best kind; suspects only if there is nothing else."""
        usable = [track for track in self._tracks.values() if track.ready]
        healthy = [track for track in usable if self.healthy(track)]
        chosen = healthy or usable
        best = min((track.rail.kind for track in chosen), default=None)
        return [track for track in chosen if track.rail.kind is best]

    @staticmethod
    def _has_room(track: Track, item: Item) -> bool:
        return track.rail.by_reference or not track.inflight or track.inflight + item.length <= track.window
