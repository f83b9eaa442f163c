"""Report of checks, each with a name, a measured value, a limit, and whether the limit holds."""

import time
from collections.abc import Callable


class Report:
    """Prints every check immediately and records the failed ones."""

    def __init__(self) -> None:
        self.checks = 0
        self.failed: list[str] = []

    def below(self, name: str, measured: float, limit: float) -> None:
        """Checks that `measured` is smaller than `limit`; NaN fails."""
        self._line(name, f"{measured:.2e}", f"< {limit:.0e}", measured < limit)

    def above(self, name: str, measured: float, limit: float) -> None:
        """Checks that `measured` is larger than `limit`: an effect must exceed the tolerance that is used to test it."""
        self._line(name, f"{measured:.2e}", f"> {limit:.0e}", measured > limit)

    def equal(self, name: str, ours: list, theirs: list) -> None:
        """Checks that two sequences are equal; the measured value is the number of differing items."""
        differing = abs(len(ours) - len(theirs)) + sum(a != b for a, b in zip(ours, theirs))
        self._line(name, f"{differing} of {len(theirs)}", "= 0", differing == 0 and len(theirs) > 0)
        if differing:
            at = next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), min(len(ours), len(theirs)))
            self.note(f"first difference at {at}: ours {ours[at : at + 8]}, theirs {theirs[at : at + 8]}")

    def note(self, text: str) -> None:
        """Prints a line that is not a check."""
        print(f"  {text}", flush=True)

    def part(self, title: str, work: Callable[[], None]) -> None:
        """Runs one part and prints its duration. A part that raises an error counts as failed; the others still run."""
        print(f"\n{title}", flush=True)
        start = time.monotonic()
        try:
            work()
        except Exception as error:  # no error may hide the results of the other parts
            self._line(f"{type(error).__name__}: {error}", "-", "none", False)
        self.note(f"{time.monotonic() - start:.0f} s")

    def _line(self, name: str, measured: str, limit: str, holds: bool) -> None:
        self.checks += 1
        if not holds:
            self.failed.append(name)
        print(f"{name:<58} {measured:>12}  {limit:<8} {'ok' if holds else 'FAIL'}", flush=True)
