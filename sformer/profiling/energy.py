"""What operations would cost: every constant named and sourced, and the fair twin beside.

Figures are estimates of arithmetic and of one reading of weights and spikes from memory, for comparing networks with
one another. No chip was measured.
"""
import math
from dataclasses import asdict, dataclass
from typing import Any, Dict, List, Sequence

from ..neurons import CODINGS
from .operations import Operation, Site

__all__ = ['Constants', 'energy', 'verdicts']

SOURCE = "M. Horowitz, Computing's energy problem (and what we can do about it), ISSCC 2014; 45 nm, 0.9 V"


@dataclass(frozen=True)
class Constants:
    """Energy per operation [pJ] (Horowitz, ISSCC 2014, figure 1.1.9: 45 nm).

    Args:
        fp32_mac: Multiply (3.7) and add (0.9) in float32: what the literature charges a network without spikes.
        fp32_add: Add in float32: what the literature charges a spike.
        int8_mac: Multiply of int8 (0.2), accumulated in int32 (0.1).
        int32_add: Accumulation of an int8 weight in int32.
        comparison: Comparison with a threshold, an addition in int32.
        byte: Reading a byte from an SRAM of 1 MB (100 pJ for 64 bits); +- 50 % with size and layout.
    """
    fp32_mac: float = 4.6
    fp32_add: float = 0.9
    int8_mac: float = 0.3
    int32_add: float = 0.1
    comparison: float = 0.1
    byte: float = 12.5


def energy(
        operations: Sequence[Operation],
        sites: Sequence[Site],
        constants: Constants = Constants(),
) -> Dict[str, Any]:
    """Energy per image [mJ] of the source, of its quantised twin, and of the SFormer by coding.

    Args:
        operations: Products, as `profile_operations` counts them.
        sites: Neurons, likewise.
        constants: Energy per operation [pJ].

    Returns:
        `proxy`: what the literature compares, float32 multiply-accumulates against additions per unary spike, by which
        the memory and the comparisons are free. `account`: for `quantised` (int8 weights and activations, the same
        bits, every product computed) and for each coding, `operations`, `comparisons`, `weights`, `spikes`, `total`.
        `constants` with their source.
    """
    c = constants
    spiking = [operation for operation in operations if operation.kind != 'floating']
    floating = sum(operation.macs for operation in operations if operation.kind == 'floating')
    macs = sum(operation.macs for operation in spiking)
    planes = {site.name: site.planes for site in sites}
    caused = {coding: sum(operation.synaptic_operations[coding] for operation in spiking) for coding in CODINGS}
    neurons = sum(site.neurons for site in sites)
    # a level is found by halving: one comparison per bit of it
    comparisons = sum(site.neurons * (2 * (site.levels or 127)).bit_length() for site in sites)
    weights = sum(operation.weights for operation in spiking) * c.byte
    # a spike is a byte: in unary and binary code its address among 256 neurons, else its level, which may take two
    sent = {coding: sum(site.neurons * site.spikes[coding] * (site.planes if coding == 'graded' else 1)
                        for site in sites) for coding in CODINGS}
    # and a multiplier of int8 takes a level of two bytes in two steps
    multiplied = sum(operation.synaptic_operations['graded'] * math.prod(planes[name] for name in operation.operands)
                     for operation in spiking)
    computed = {'unary': caused['unary'] * c.int32_add, 'binary': caused['binary'] * c.int32_add,
                'graded': multiplied * c.int8_mac}
    account = {'quantised': _parts(macs * c.int8_mac, neurons * c.int32_add, weights, neurons * c.byte)}
    for coding in CODINGS:
        account[coding] = _parts(computed[coding], comparisons * c.comparison, weights, sent[coding] * c.byte)
    return dict(
        proxy=dict(source=_mj((macs + floating) * c.fp32_mac), sformer=_mj(
            caused['unary'] * c.fp32_add + floating * c.fp32_mac)),
        account=account, constants=dict(asdict(c), source=SOURCE))


def verdicts(figures: Dict[str, Any]) -> List[str]:
    """What the figures say, in words: who wins, and by how much."""
    account, proxy = figures['account'], figures['proxy']
    twin = account['quantised']['total']
    ratio = proxy['sformer'] / proxy['source']
    lines = [f'By the literature\'s proxy, which charges neither memory nor comparisons, the SFormer takes {ratio:.2f} '
             f'of the energy of its float32 source.']
    for coding in ('graded', 'binary', 'unary'):
        ratio = account[coding]['total'] / twin
        less = 'less' if ratio < 1 else 'no less'
        lines.append(f'In {coding} coding it takes {ratio:.2f} of the energy of a network quantised to int8: {less} '
                     f'than that.')
    return lines


def _parts(operations: float, comparisons: float, weights: float, spikes: float) -> Dict[str, float]:
    parts = dict(operations=operations, comparisons=comparisons, weights=weights, spikes=spikes)
    return {key: _mj(value) for key, value in dict(parts, total=sum(parts.values())).items()}


def _mj(picojoules: float) -> float:
    return picojoules * 1e-9
