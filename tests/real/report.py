"""Checks: a name, a measured value, a limit, and whether it holds."""

import time
from collections.abc import Callable


class Report:
    """Prints every check at once and remembers whether any failed."""

    def __init__(self) -> None:
        self.checks = 0
        self.failed: list[str] = []

    def below(self, name: str, measured: float, limit: float) -> None:
        """`measured` must be smaller than `limit`; NaN is not."""
        self._line(name, f"{measured:.2e}", f"< {limit:.0e}", measured < limit)

    def above(self, name: str, measured: float, limit: float) -> None:
        """`measured` must be larger than `limit`: the effect that a tolerance guards is larger than the tolerance."""
        self._line(name, f"{measured:.2e}", f"> {limit:.0e}", measured > limit)

    def equal(self, name: str, ours: list, theirs: list) -> None:
        """Two sequences must be the same; what is measured is the number of items that are not."""
        differing = abs(len(ours) - len(theirs)) + sum(a != b for a, b in zip(ours, theirs))
        self._line(name, f"{differing} of {len(theirs)}", "= 0", differing == 0 and len(theirs) > 0)
        if differing:
            at = next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), min(len(ours), len(theirs)))
            self.note(f"first difference at {at}: ours {ours[at : at + 8]}, theirs {theirs[at : at + 8]}")

    def note(self, text: str) -> None:
        """A line that is no check."""
        print(f"  {text}", flush=True)

    def part(self, title: str, work: Callable[[], None]) -> None:
        """Runs one part and says how long it took. A part that cannot run has failed; the others still run."""
        print(f"\n{title}", flush=True)
        start = time.monotonic()
        try:
            work()
        except Exception as error:  # whatever it is, it must not hide the other parts' figures
            self._line(f"{type(error).__name__}: {error}", "-", "none", False)
        self.note(f"{time.monotonic() - start:.0f} s")

    def _line(self, name: str, measured: str, limit: str, holds: bool) -> None:
        self.checks += 1
        if not holds:
            self.failed.append(name)
        print(f"{name:<58} {measured:>12}  {limit:<8} {'ok' if holds else 'FAIL'}", flush=True)
