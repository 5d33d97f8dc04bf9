"""A file that cannot be used: which one, what is wrong, how to mend it."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from sss_jax.errors import DataError


def shown(name: object) -> str:
    """Return text that any terminal can print: odd bytes and control characters are escaped."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode()
        for c in str(name)
    )


class FileFault(DataError):
    """A problem with one file, kept in parts so that a report can list it."""

    def __init__(self, path: str | Path, problem: str, fix: str) -> None:
        super().__init__(f"{shown(path)}: {problem}. To mend it: {fix}.")
        self.path, self.problem, self.fix = Path(path), problem, fix


Report = Callable[[FileFault], None]


@contextlib.contextmanager
def collected(faults: list[FileFault]) -> Iterator[None]:
    """Add the fault that ends what is done here to a list, instead of raising it."""
    try:
        yield
    except FileFault as fault:
        faults.append(fault)


def stop(fault: FileFault) -> None:
    """Raise the first fault; a check passes a collector in its place."""
    raise fault
