"""The one table of what an operation is taken to cost: each constant named, sourced, and open to another value."""
import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from ..errors import SFormerError

__all__ = ['ConstantRow', 'Constants', 'constants_table', 'read_constants']

HOROWITZ = "M. Horowitz, Computing's energy problem (and what we can do about it), ISSCC 2014, 45 nm, 0.9 V"
YAN = ('Z. Yan, Z. Bai, K. Tang, W.-F. Wong, Reconsidering the energy efficiency of spiking neural networks, '
       'arXiv 2409.08290, 22 nm, 0.8 V; as two independent notes on that paper quote it')
LOIHI = 'M. Davies et al., Loihi, IEEE Micro 38(1), 2018, table 2: a tile hop, east to west; 14 nm'
OURS = 'assumption of this account'

# The one operation with a figure at both nodes: an addition in int32, 0.05448 pJ (YAN) and 0.1 pJ (HOROWITZ). Nominal
# scaling (Stillmaker and Baas, Integration 58, 2017; 45 nm at 0.9 V to 20 nm at 0.8 V) would give 0.22.
TO_22_NM = 0.5448
SCALED = f'{HOROWITZ}, times {TO_22_NM} for 22 nm (the ratio of the two additions in int32)'


def _constant(value: float, unit: str, meaning: str, source: str) -> float:
    return dataclasses.field(default=value, metadata=dict(unit=unit, meaning=meaning, source=source))


@dataclass(frozen=True)
class Constants:
    """Energies of operations and of moving a bit, by name; `constants_table` says unit, meaning and source of each.

    Raises:
        SFormerError: If a value is negative, or no finite number; names it.
    """
    fp32_mac: float = _constant(4.6, 'pJ', 'proxy: multiply (3.7) and add (0.9) in float32', HOROWITZ)
    fp32_add: float = _constant(0.9, 'pJ', 'proxy: a spike, as an addition in float32', HOROWITZ)
    accumulate: float = _constant(0.05448, 'pJ', 'addition of an int8 weight in int32', YAN)
    comparison: float = _constant(0.05448, 'pJ', 'comparison with a threshold', YAN)
    int8_mac: float = _constant(0.3 * TO_22_NM, 'pJ', 'multiply of int8 (0.2), accumulated in int32 (0.1)', SCALED)
    float_mac: float = _constant(4.6 * TO_22_NM, 'pJ', 'multiply and add in float32 of what does not spike', SCALED)
    weight_bit: float = _constant(100 / 64 * TO_22_NM, 'pJ/bit', 'a weight from an SRAM of 1 MB (64 bits: 100)', SCALED)
    activation_bit: float = _constant(
        20 / 64 * TO_22_NM, 'pJ/bit', 'a spike or an activation to or from an SRAM of 32 KB (64 bits: 20)', SCALED)
    dense_hop: float = _constant(0.25, 'pJ/bit/hop', 'a bit of a dense stream, to the next core', YAN)
    event_hop: float = _constant(3.0, 'pJ/hop', 'a spike with its address, to the next core', LOIHI)
    hops: float = _constant(1., '', 'cores that a spike or an activation passes; a matter of mapping', OURS)
    address_bits: float = _constant(8., 'bit', 'address of a spike in a buffer, of 256 neurons', OURS)
    division_macs: float = _constant(4., '', 'multiply-adds of a division or root: two Newton steps', OURS)
    exp_macs: float = _constant(9., '', 'multiply-adds of exp, tanh or erf: reduction, polynomial of degree 6', OURS)

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise SFormerError(f'constant {name} must be a number of at least 0, got {value!r}.')


class ConstantRow(TypedDict):
    """A constant, as it is listed."""
    name: str
    value: float
    unit: str
    meaning: str
    source: str


def constants_table(constants: Constants = Constants()) -> list[ConstantRow]:
    """All constants; the source of a changed value is who changed it."""
    rows = []
    for field in dataclasses.fields(constants):
        value = getattr(constants, field.name)
        about = field.metadata
        source = about['source'] if value == field.default else f'given; the default is {field.default:.5g}'
        rows.append(ConstantRow(
            name=field.name, value=value, unit=about['unit'], meaning=about['meaning'], source=source))
    return rows


def read_constants(path: Path | None = None, pairs: Sequence[str] = ()) -> Constants:
    """Constants of which a JSON file, and then pairs `name=value`, change some.

    Raises:
        SFormerError: If the file cannot be read or is no object, a name is unknown, or a value is no number.
    """
    changes: dict[str, float] = {}
    if path is not None:
        try:
            given = json.loads(path.read_text(encoding='utf-8'))
        except (OSError, ValueError, RecursionError) as e:
            raise SFormerError(f'{path} cannot be read as JSON: {getattr(e, "strerror", None) or e}.') from e
        if not isinstance(given, Mapping):
            raise SFormerError(f'{path} must hold an object of names and values, such as {{"hops": 2}}.')
        changes.update(given)
    for pair in pairs:
        name, _, value = pair.partition('=')
        try:
            changes[name] = float(value)
        except ValueError:
            raise SFormerError(f'--constant takes name=value with a number, got {pair!r}.') from None
    known = [field.name for field in dataclasses.fields(Constants)]
    if unknown := [name for name in changes if name not in known]:
        raise SFormerError(f'no constant is named {unknown[0]!r}; there are {", ".join(known)}.')
    return Constants(**changes)
