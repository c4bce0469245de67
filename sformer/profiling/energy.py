"""What operations would cost, beside the fair twin: an account of arithmetic, memory and routing.

The account follows arXiv 2409.08290, `E = E_op + E_compare + E_weights + E_activations + E_routing + E_non-spiking`.
Figures are estimates, for comparing networks with one another. No chip was measured.
"""
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TypedDict

from ..neurons import CODINGS
from .constants import ConstantRow, Constants, constants_table
from .floating import FUNCTIONS, Floating
from .operations import FEEDBACK, Operation, Site

__all__ = ['MOVEMENT', 'TWIN', 'EnergyFigures', 'energy', 'ratio_to', 'traffic', 'verdicts']

STORED_BITS, FLOAT_BITS = 8, 32
MOVEMENT = ('weights', 'activations', 'routing')  # data that is moved, of which figures are +- 50 %
LOW_MOVEMENT, HIGH_MOVEMENT = 0.5, 1.5
TWIN = 'quantised'
SKIPPING = 'quantised, skipping zeros'
ALIKE = 0.05  # what differs by less is no win


class EnergyFigures(TypedDict):
    """What `energy` finds, [mJ] per image.

    Args:
        proxy: What the literature compares, of `source` and `sformer`: float32 multiply-accumulates against additions
            per unary spike, by which memory, comparisons and functions are free.
        account: For `quantised` (int8 weights, activations of ceil(log2(2 N + 1)) bits, every product computed), for
            the same where hardware skips zeros, neither of which has feedback, and for each coding, whose feedback is
            charged: `operations`, `comparisons`, `weights`, `activations`, `routing`, `floating`, `total`, and `low`
            and `high`, the total where moving data costs half and half as much again.
        activity: That measured, which leaves out pixels, as they always fire.
        break_even: Per coding the activity below which it takes 5 % less than `quantised`, at as many spikes per firing
            neuron, None if at none.
        bytes: What is moved: `weights`, and spikes or activations by coding.
        constants: Energy per operation and bit.
    """
    proxy: dict[str, float]
    account: dict[str, dict[str, float]]
    activity: float
    break_even: dict[str, float | None]
    bytes: dict[str, float]
    constants: list[ConstantRow]


def energy(
        operations: Sequence[Operation],
        sites: Sequence[Site],
        floating: Sequence[Floating] = (),
        constants: Constants = Constants(),
) -> EnergyFigures:
    """Energy per image [mJ] of the source, of its bit-matched quantised twin, and of the SFormer by coding.

    Args:
        operations: Products, as `profile_model` counts them.
        sites: Neurons, likewise.
        floating: Functions on currents, likewise.
        constants: Energy per operation and bit.
    """
    c = constants
    spiking = [operation for operation in operations if operation.kind != 'floating']
    macs = sum(operation.macs for operation in operations)
    analog = macs - sum(operation.macs for operation in spiking)
    unary = sum(operation.synaptic_operations['unary'] for operation in spiking)
    account = _account(operations, sites, floating, c)
    counted = [site for site in sites if site.counted]
    activity = sum(s.neurons * s.activity for s in counted) / max(sum(s.neurons for s in counted), 1)
    budget = (1 - ALIKE) * account[TWIN]['total']
    moved = {'weights': _weight_bits(operations) / 8}
    for coding in (TWIN, *CODINGS):
        moved[coding] = sum(traffic(site, coding, c)[0] for site in _sites_of(coding, sites)) / 8
    return EnergyFigures(
        proxy=dict(source=_mj(macs * c.fp32_mac), sformer=_mj(unary * c.fp32_add + analog * c.fp32_mac)),
        account=account, activity=activity,
        break_even={name: _break_even(operations, sites, floating, c, name, activity, budget) for name in CODINGS},
        bytes=moved, constants=constants_table(c))


def traffic(site: Site, coding: str, constants: Constants = Constants()) -> tuple[float, float]:
    """Bits per image that a site's spikes take in a buffer, and the energy [pJ] that one hop of them takes.

    They are sent as events, each spike with its address, sign and (graded) level or (binary) plane, or as a dense
    stream, silent neurons included, whichever takes less: as many bits as tell the levels apart in graded coding and
    for the `quantised` twin, one bit per bit plane (and sign) in binary, one per possible spike in unary coding.

    Args:
        site: Neurons.
        coding: One of `CODINGS`, or `quantised`, which has no events.
        constants: Energy per bit.
    """
    c = constants
    width = site.top.bit_length()
    dense = site.neurons * {'unary': (1 + site.signed) * site.top, 'binary': width + site.signed}.get(coding, site.bits)
    stream = dense, dense * c.dense_hop
    if coding not in CODINGS:
        return stream
    payload = {'unary': 0, 'binary': (width - 1).bit_length()}.get(coding, site.bits - site.signed) + site.signed
    spikes = site.neurons * site.spikes[coding]
    events = spikes * (c.address_bits + payload), spikes * (c.event_hop + payload * c.dense_hop)

    def cost(way: tuple[float, float]) -> float:
        bits, hop = way
        return 2 * bits * c.activation_bit + hop * c.hops
    return min(events, stream, key=cost)


def _account(
        operations: Sequence[Operation],
        sites: Sequence[Site],
        floating: Sequence[Floating],
        c: Constants,
) -> dict[str, dict[str, float]]:
    spiking = [operation for operation in operations if operation.kind != 'floating']
    analog = [operation for operation in operations if operation.kind == 'floating']
    planes = {site.name: site.planes for site in sites}
    macs = sum(operation.macs for operation in spiking)
    caused = {}
    for coding in CODINGS:
        caused[coding] = sum(operation.synaptic_operations[coding] for operation in spiking)
    multiplied = 0.
    for operation in spiking:  # a multiplier of int8 takes a level of two bytes in two steps
        steps = math.prod(planes[name] for name in operation.operands)
        multiplied += operation.synaptic_operations['graded'] * steps
    neurons = sum(site.neurons for site in _sites_of(TWIN, sites))
    skipped = sum(o.synaptic_operations['graded'] for o in spiking if o.kind != FEEDBACK)
    # a level is found by halving: one comparison per bit of it; the twin scales and rounds
    comparisons = sum(site.neurons * site.bits for site in sites) * c.comparison
    rounding = neurons * c.int8_mac
    rest = sum(operation.macs for operation in analog) * c.float_mac + _functions(floating, c) * c.float_mac
    computed = {
        TWIN: (macs * c.int8_mac, rounding), SKIPPING: (skipped * c.int8_mac, rounding),
        'graded': (multiplied * c.int8_mac, comparisons), 'binary': (caused['binary'] * c.accumulate, comparisons),
        'unary': (caused['unary'] * c.accumulate, comparisons)}
    account = {}
    for name, (products, fired) in computed.items():
        moved = [traffic(site, name, c) for site in _sites_of(name, sites)]
        weights = _weight_bits([o for o in operations if name in CODINGS or o.kind != FEEDBACK])
        parts = dict(
            operations=products, comparisons=fired, weights=weights * c.weight_bit,
            activations=2 * sum(bits for bits, _ in moved) * c.activation_bit,  # written and read
            routing=sum(hop for _, hop in moved) * c.hops, floating=rest)
        movement = sum(parts[part] for part in MOVEMENT)
        total = sum(parts.values())
        account[name] = {part: _mj(value) for part, value in dict(
            parts, total=total, low=total - (1 - LOW_MOVEMENT) * movement,
            high=total + (HIGH_MOVEMENT - 1) * movement).items()}
    return account


def _sites_of(name: str, sites: Sequence[Site]) -> list[Site]:
    """Sites that a coding sends spikes of: none are lateral of a twin without neurons."""
    return [site for site in sites if name in CODINGS or not site.lateral]


def _weight_bits(operations: Sequence[Operation]) -> float:
    return sum(o.weights * (FLOAT_BITS if o.kind == 'floating' else STORED_BITS) for o in operations)


def _functions(floating: Sequence[Floating], c: Constants) -> float:
    """Multiply-adds of all functions on currents."""
    def of_one(function: Floating) -> float:
        macs, divisions, exps = FUNCTIONS[function.function]
        return function.elements * (macs + divisions * c.division_macs + exps * c.exp_macs)

    return sum(map(of_one, floating))


def _break_even(
        operations: Sequence[Operation],
        sites: Sequence[Site],
        floating: Sequence[Floating],
        c: Constants,
        coding: str,
        activity: float,
        budget: float,
) -> float | None:
    """Activity below which a coding takes less than a budget [mJ], if all sites but pixels spike less often by one
    factor."""
    always = {site.name for site in sites if not site.counted}

    def scaled(counts: dict[str, float], factor: float) -> dict[str, float]:
        return {key: count * factor for key, count in counts.items()}

    def total(factor: float) -> float:
        fewer = []
        for o in operations:
            share = factor ** len({*o.operands} - always)
            fewer.append(dataclasses.replace(o, synaptic_operations=scaled(o.synaptic_operations, share)))
        silent = [dataclasses.replace(s, spikes=scaled(s.spikes, factor)) if s.counted else s for s in sites]
        return _account(fewer, silent, floating, c)[coding]['total']

    if not activity or total(0) >= budget:
        return None
    most = 1 / activity
    return activity * (most if total(most) < budget else _root(lambda factor: total(factor) - budget, 0, most))


def _root(function: Callable[[float], float], low: float, high: float) -> float:
    """Where a function that increases is zero, by halving."""
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) < 0 else (low, middle)
    return (low + high) / 2


def ratio_to(parts: dict[str, float], twin: dict[str, float]) -> tuple[float, float, float]:
    """How much of the energy of its twin a network takes; and the least and the most of it, where moving data takes
    half and half as much again in both."""
    ratio, low, high = (parts[edge] / twin[edge] for edge in ('total', 'low', 'high'))
    return ratio, min(low, ratio, high), max(low, ratio, high)


def verdicts(figures: EnergyFigures) -> list[str]:
    """What the figures of `energy` say, in words: who wins, by how much, and from which activity on it would."""
    account, proxy = figures['account'], figures['proxy']
    ratio = proxy['sformer'] / proxy['source']
    lines = [f'By the literature\'s proxy, which charges neither memory nor comparisons, the SFormer takes {ratio:.2f} '
             f'times the energy of its float32 source.']
    twin, skipping = account[TWIN], account[SKIPPING]
    for coding in ('graded', 'binary', 'unary'):
        parts, limit = account[coding], figures['break_even'][coding]
        ratio, low, high = ratio_to(parts, twin)
        line = (f'In {coding} coding it takes {ratio:.2f} ({low:.2f} to {high:.2f}) '
                f'times the energy of its bit-matched quantised twin')
        if ratio < 1 - ALIKE:
            line += ', less than that.'
        else:
            line += ': it does not win' if ratio > 1 + ALIKE else f': that is as much, within {ALIKE:.0%}'
            line += ', and would not take less at any activity.' if limit is None else (
                f', at an activity of {figures["activity"]:.2f}. It would take less below {limit:.2f}.')
        lines.append(line)
    best = min(('graded', 'binary', 'unary'), key=lambda coding: account[coding]['total'])
    lines.append(f'Hardware that skips zeros, as it skips silent neurons here, would take '
                 f'{skipping["total"] / twin["total"]:.2f} times the energy of that twin; {best} coding takes '
                 f'{account[best]["total"] / skipping["total"]:.2f} times as much as it would.')
    moved = {name: f'{count / 1e3:.4g} kB' for name, count in figures['bytes'].items()}
    lines.append(f'Moved per image: {moved.pop("weights")} of weights; of spikes, or activations of the twin, '
                 f'{", ".join(f"{amount} {name}" for name, amount in moved.items())}.')
    return lines


def _mj(picojoules: float) -> float:
    return picojoules * 1e-9
