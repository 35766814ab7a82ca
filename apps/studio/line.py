"""The line before the pipeline: who draws next, how many are ahead, and how long that will take."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

MOST_WAITING = 64
# What the first picture is taken to need, before anything was measured.
FIRST_GUESS = 0.2


class Place:
    """A place in the line. `steps_left` is kept up to date by who draws, so that those behind know how long."""

    def __init__(self, line: Line, steps: float, later: float):
        self.line, self.steps_left, self.later = line, steps, later

    def ahead(self) -> tuple[int, float]:
        """How many are served before this one, and about how many seconds that takes."""
        with self.line.lock:
            before = self.line.places[: self.line.places.index(self)]
            return len(before), self.line.seconds_a_step * sum(place.steps_left for place in before)


class Line:
    """First come, first served; one at a time.

    Args:
        most: how many may stand in it.
    """

    def __init__(self, most: int = MOST_WAITING):
        self.most, self.seconds_a_step = most, FIRST_GUESS
        self.lock, self.places = threading.Lock(), []

    @contextmanager
    def place(self, steps: float, later: float = 0) -> Iterator[Place]:
        """Stand in the line with a wish of so many denoising steps of the usual size, and leave it with the block.

        Args:
            steps: of this wish.
            later: of those that the same person will stand in the line for again.

        Raises:
            ValueError: too many stand in it.
        """
        mine = Place(self, steps, later)
        with self.lock:
            if len(self.places) >= self.most:
                raise ValueError(f"{self.most} pictures are waited for already: try again in a minute")
            self.places.append(mine)
        try:
            yield mine
        finally:
            with self.lock:
                self.places.remove(mine)

    def measured(self, seconds: float) -> None:
        """Take in how long one step of the usual size took."""
        with self.lock:
            self.seconds_a_step += 0.2 * (seconds - self.seconds_a_step)


class Pace:
    """Times the steps of one drawing for the line, and counts down what is left of its place."""

    def __init__(self, place: Place):
        self.place, self.last = place, None

    def step(self, share: float = 1.0) -> float:
        """A step is done that is `share` of a usual one: the seconds that are left for all of this person's."""
        now = time.monotonic()
        if self.last is not None:
            self.place.line.measured((now - self.last) / share)
        self.last = now
        self.place.steps_left = max(0, self.place.steps_left - share)
        return (self.place.steps_left + self.place.later) * self.place.line.seconds_a_step
