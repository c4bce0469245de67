"""How a command ends that does not succeed."""
import sys
from typing import NoReturn

from ..errors import SFormerError

__all__ = ['RunInterruptedError', 'fail']


class RunInterruptedError(SFormerError):
    """Ctrl-C, where there is more to say than that."""


def fail(message: str, code: int = 1) -> NoReturn:
    """End the process with one line on stderr."""
    print(f'sformer: error: {" ".join(message.split())}', file=sys.stderr)
    sys.exit(code)
