"""What the bug museum exhibits: a real mistake as a tiny function, and the check that catches it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Bug:
    """A mistake that shipped somewhere, or that its paper leaves one line away.

    name    what it is called here
    seen    where: repository and thread or file; "near:" what invites it, a text or somebody's layout, where no public report was read
    wrong   the mistake, whose docstring says what it does; right does the same job by the reference
    check   takes either, and raises AssertionError for what is wrong; its name and docstring are the property that it tests
    """

    name: str
    seen: str
    wrong: Callable
    right: Callable
    check: Callable[[Callable], None]

    @property
    def mistake(self) -> str:
        """What the wrong function does, in one sentence."""
        return " ".join((self.wrong.__doc__ or "").split())

    def symptom(self) -> str:
        """The message with which the check rejects the wrong function. Raises AssertionError where it does not."""
        try:
            self.check(self.wrong)
        except AssertionError as error:
            return str(error)
        raise AssertionError(f"{self.check.__name__} accepts the bug {self.name!r}")

    @property
    def shipped(self) -> bool:
        """Whether published code or pseudo-code has made the mistake, by a report or a file that was read."""
        return not self.seen.startswith("near:")

    @property
    def place(self) -> str:
        """Where it was seen, or what is near it."""
        return self.seen.removeprefix("near:").strip()


def expect(condition: object, message: str) -> None:
    """Raise AssertionError(message) unless the condition holds (an `assert` would vanish under `python -O`)."""
    if not condition:
        raise AssertionError(message)
