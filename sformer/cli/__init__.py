"""Command line: `sformer convert | evaluate | compare | export | benchmark | profile | sweep | search | distill`, and
`list | demo | publish | card | detect`.

Commands import what is slow to load when they run.
"""

from . import failure as _failure  # noqa: F401  before anything that is slow

__all__ = ['main']


def main(argv: list[str] | None = None) -> None:
    """Entry point: mistakes of the user end in one line on stderr and a non-zero exit code."""
    from .app import run_command
    run_command(argv)
