"""The integers that neurons fire, as plain numbers: configs are checked against them before torch is loaded."""

__all__ = [
    'EXACT', 'MAX_LEVEL', 'MAX_MET_LEVEL', 'MAX_BYTE_LEVEL', 'MAX_WIDE_LEVEL', 'EXPONENTS', 'QUARTERS',
    'level_integers', 'max_levels',
]

EXACT = 2 ** 24  # integers below it are exact in float32, and so are their sums, in whatever order
MAX_LEVEL = 127  # a level is one int8 on hardware
MAX_MET_LEVEL = 63  # or, where spikes meet spikes, what every processor multiplies by its like in 8 bits
MAX_BYTE_LEVEL = 255  # or, where none is negative, one unsigned byte
MAX_WIDE_LEVEL = 128 * 127 + 127  # or, where a site says so, two int8 planes: k = 128 high + low

EXPONENTS = {'quadratic': 2, 'quartic': 4}
# Levels are quarters of squares, y_i = floor((i + c)^2 / 4) - c^2 / 4, with this c: their gaps grow by a half on
# average, from c / 2 on. The larger c, the less they spread out.
QUARTERS = {'quarter_square': 2, 'widening': 4}


def max_levels(fire_function: str) -> int:
    """Most levels of a fire function whose values an int8 holds."""
    return {'power2': 7, 'quarter_square': 20, 'widening': 18}.get(fire_function, MAX_LEVEL)


def level_integers(fire_function: str, levels: int, top: int = MAX_LEVEL) -> list[int]:
    """Level values y_1 < ... < y_N of a closed-form fire function.

    Args:
        fire_function: `uniform` (y_i = i), `quadratic` (y_i = max(i, round(S i^2 / N^2)), S = min(N^2, top)), `quartic`
            (the same with i^4), `widening` (2, 5, 8, 12, 16, 21 ...: y_i = floor((i + 4)^2 / 4) - 4),
            `quarter_square` (1, 3, 5, 8, 11, 15 ...: y_i = floor((i + 2)^2 / 4) - 1), `power2` (y_i = 2^(i-1)) or
            `byte` (1 to 255, whatever N is). `density` has no closed form and starts out as `uniform`.
        levels: Number of levels N.
        top: Largest level that the site can carry.

    Returns:
        N numbers, of `byte` 255.
    """
    if fire_function == 'byte':
        return [*range(1, MAX_BYTE_LEVEL + 1)]
    numbers = range(1, levels + 1)
    if fire_function in EXPONENTS:
        p = EXPONENTS[fire_function]
        share = min(levels ** p, top) / levels ** p
        return [max(i, round(i ** p * share)) for i in numbers]
    if fire_function in QUARTERS:
        c = QUARTERS[fire_function]
        return [(i + c) ** 2 // 4 - c ** 2 // 4 for i in numbers]
    if fire_function == 'power2':
        return [2 ** (i - 1) for i in numbers]
    return [*numbers]
