"""Dead leaves: generated images that calibrate nearly as well as photographs.

Shapes with a power-law size distribution that occlude one another have the edges, scales and spectrum of photographs.

* Lee, Mumford, Huang, 'Occlusion Models for Natural Images: A Statistical Study of a Scale-Invariant Dead Leaves
  Model', IJCV 2001.
* Baradad, Wulff, Wang, Isola, Torralba, 'Learning to See by Looking at Noise', NeurIPS 2021, arXiv 2106.05963.
"""
import math
from collections.abc import Iterator

import numpy as np

from ..errors import SFormerError

__all__ = ['dead_leaves', 'dead_leaves_image']

# The numbers below fit photographs (CIFAR-10 at 32 pixels, ImageNet at 224): mean and contrast of images and their
# spread, saturation, correlation of the channels, gradients and power spectrum.
#
# Only operations that IEEE 754 defines to the last bit are used, and sums of integers: no exp, sin or matrix product,
# whose last bit depends on the machine.

_OVERSAMPLING = 2  # shapes are drawn finer and averaged, as a camera averages over a pixel
_MAX_LEAVES = 800


def dead_leaves(num_images: int, size: tuple[int, int, int], seed: int = 0) -> Iterator[np.ndarray]:
    """Generate dead-leaves images: occluding discs, rectangles and triangles of radius density p(r) ~ r^-3.

    Image i depends on `seed` and i (and the size) alone, bit for bit on every machine. Lee, Mumford and Huang, IJCV
    2001; Baradad et al., arXiv 2106.05963.

    Args:
        num_images: Images to generate.
        size: (C, H, W) with C 1 (grey) or 3 (RGB).
        seed: Seed, 0 or more.

    Yields:
        uint8 images (H, W, C).

    Raises:
        SFormerError: C is neither 1 nor 3.
    """
    if size[0] not in (1, 3):
        raise SFormerError(f'dead leaves are grey (1, H, W) or RGB (3, H, W), not {tuple(size)}')
    return (dead_leaves_image(index, size, seed) for index in range(num_images))


def dead_leaves_image(index: int, size: tuple[int, int, int], seed: int) -> np.ndarray:
    """Image `index` of `dead_leaves`, uint8 (H, W, C)."""
    channels, height, width = size
    rng = np.random.default_rng([seed, index])
    leaves = draw_leaves(rng, height, width)
    ids = stack_leaves(leaves, height, width)
    image = _develop(rng, _colour(rng, leaves, ids))
    if channels == 1:
        # ITU-R 601 luma in integers, as PIL converts to 'L'.
        rgb = image.astype(np.int32)
        luma = (rgb[..., 0] * 19595 + rgb[..., 1] * 38470 + rgb[..., 2] * 7471 + 0x8000) >> 16
        image = luma.astype(np.uint8)[..., None]
    return image


def draw_radii(rng: np.random.Generator, num: int, r_min: float, r_max: float) -> np.ndarray:
    """Radii (num,) of density p(r) ~ r^-3 in [r_min, r_max], by inversion."""
    return 1 / np.sqrt(1 / (r_max * r_max) + rng.random(num) * (1 / (r_min * r_min) - 1 / (r_max * r_max)))


def draw_leaves(rng: np.random.Generator, height: int, width: int) -> dict[str, np.ndarray]:
    """Draw the leaves of an image, front to back, the last one being the background. Lengths are in pixels.

    Returns:
        (num_leaves,) arrays: radius `r` (circumscribed), centre `x`, `y`, direction `cos`, `sin`, aspect ratio `aspect`
        and `shape` (0 disc, 1 rectangle, 2 triangle).
    """
    short = min(height, width)
    nearness, cover, backdrops, axes = rng.random(4).tolist()
    # Details are finer in a distant scene than in a close-up, but pixels bound them.
    r_min = max(1.6, short * (1 / 40 + (1 / 8 - 1 / 40) * nearness * nearness * nearness))
    r = draw_radii(rng, _MAX_LEAVES, r_min, max(r_min, float(short)))
    # Stop when the leaves would cover the image 0.3 to 2.5 times: the fewer, the emptier the scene.
    num = 1 + int(np.searchsorted(np.cumsum(r[:-1] * r[:-1]), (0.3 + 2.2 * cover) * height * width / 1.8))
    # Up to three large leaves at the back are the sky, the wall, the ground.
    r = np.concatenate([r[:num], short * (1 + rng.random(int(4 * backdrops)))])
    num = len(r)

    # Centres outside the image, too: otherwise the border would be emptier than the middle.
    x, y = rng.random((2, num)) * (np.array([[width], [height]]) + 2 * r) - r
    dx, dy = _normal(rng, 2, num)
    norm = np.sqrt(dx * dx + dy * dy) + 1e-9
    # Gravity and buildings: part of a scene is horizontal and vertical, to an extent that differs.
    upright = rng.random(num) < axes
    leaves = dict(
        r=r,
        x=x,
        y=y,
        cos=np.where(upright, dx > 0, dx / norm),
        sin=np.where(upright, dx <= 0, dy / norm),
        aspect=0.35 + 0.65 * rng.random(num),
        shape=rng.integers(0, 3, num),
    )
    background = dict(r=max(height, width) / 2, x=width / 2, y=height / 2, cos=1., sin=0., aspect=1., shape=0)
    return {key: np.append(value, background[key]) for key, value in leaves.items()}


def stack_leaves(leaves: dict[str, np.ndarray], height: int, width: int) -> np.ndarray:
    """Find the foremost leaf of each point, (oversampling * height, oversampling * width); the last covers the rest."""
    height, width = _OVERSAMPLING * height, _OVERSAMPLING * width
    background = len(leaves['r']) - 1
    ids = np.full((height, width), background, dtype=np.int32)
    xs = np.arange(width, dtype=np.float32) + np.float32(0.5)
    ys = np.arange(height, dtype=np.float32) + np.float32(0.5)
    geometry = [leaves[key][:background].tolist() for key in ('r', 'x', 'y', 'cos', 'sin', 'aspect', 'shape')]
    for i, (r, x, y, cos, sin, aspect, shape) in enumerate(zip(*geometry, strict=True)):
        r *= _OVERSAMPLING
        x *= _OVERSAMPLING
        y *= _OVERSAMPLING
        x0, x1 = max(int(x - r), 0), min(int(x + r) + 1, width)
        y0, y1 = max(int(y - r), 0), min(int(y + r) + 1, height)
        if x0 >= x1 or y0 >= y1:
            continue
        dx = xs[x0:x1] - x
        dy = (ys[y0:y1] - y)[:, None]
        u = cos * dx + sin * dy  # along the leaf, and across it, stretched to an aspect ratio of one
        v = (cos / aspect) * dy - (sin / aspect) * dx
        if shape == 0:
            inside = u * u + v * v <= r * r
        elif shape == 1:
            inside = np.maximum(np.abs(u), np.abs(v)) <= r * 0.7071067811865476
        else:
            inside = (u >= -0.5 * r) & (u + 1.7320508075688772 * np.abs(v) <= r)
        box = ids[y0:y1, x0:x1]
        inside &= box == background
        box[inside] = i
    return ids


def _colour(rng: np.random.Generator, leaves: dict[str, np.ndarray], ids: np.ndarray) -> np.ndarray:
    """Colour and shade the leaves, and average to pixels: linear float32 values (H, W, 3), about 0 to 1."""
    f = np.float32
    height, width = ids.shape[0] // _OVERSAMPLING, ids.shape[1] // _OVERSAMPLING
    num = len(leaves['r'])

    # A palette of 3 to 8 colours: luminance, and two smaller chroma coordinates, red - green and yellow - blue, which
    # correlate (warm against cold). A few images are grey.
    size = int(rng.integers(3, 9))
    of = rng.integers(0, size, num)
    saturation = 0.02 + 0.21 * rng.random()
    if rng.random() < 0.02:
        saturation = 0.
    jitter = _normal(rng, 3, num)
    palette = _normal(rng, 2, size)
    cast = _normal(rng, 2) * 0.45
    luminance = 0.46 + 0.2 * ((2 * rng.random(size) - 1)[of] * 1.7320508075688772 + 0.3 * jitter[0])
    warm = saturation * (cast[0] + palette[0][of] + 0.25 * jitter[1])
    other = saturation * (cast[1] + palette[1][of] + 0.25 * jitter[2])
    red_green = 0.01 + 0.8 * warm
    yellow_blue = 0.04 + 0.95 * (0.55 * warm + 0.835 * other)
    yellow = luminance + yellow_blue / 3  # so that the luminance is the mean of R, G and B
    colours = np.stack([yellow + red_green / 2, yellow - red_green / 2, yellow - yellow_blue], axis=1)

    # Shading: every leaf has a gradient, the light a direction (mostly from above), every leaf some of the texture.
    slope_x, slope_y = _normal(rng, 2, num) * 0.12 / leaves['r']
    offset = -(slope_x * leaves['x'] + slope_y * leaves['y'])
    light_x, light_y = (_normal(rng, 2) * 0.08 - np.array([0., 0.05])).tolist()
    roughness = rng.random(num)
    roughness = (0.15 * roughness * roughness).astype(f)
    texture = _texture(rng, height, width)
    xs = (np.arange(ids.shape[1], dtype=f) + f(0.5)) / f(_OVERSAMPLING)
    ys = (np.arange(ids.shape[0], dtype=f) + f(0.5))[:, None] / f(_OVERSAMPLING)
    shade = (slope_x.astype(f)[ids] + f(2 * light_x / width)) * xs
    shade += (slope_y.astype(f)[ids] + f(2 * light_y / height)) * ys
    shade += (offset.astype(f) - f(light_x + light_y))[ids]
    shade += roughness[ids] * texture.repeat(_OVERSAMPLING, axis=0).repeat(_OVERSAMPLING, axis=1)

    image = colours.astype(f)[ids]
    image += shade[..., None]
    image = image[0::2] + image[1::2]
    return (image[:, 0::2] + image[:, 1::2]) * f(0.25)


def _develop(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Blur, expose and quantise linear values (H, W, 3) to a uint8 image, as a camera does."""
    f = np.float32
    image = image + f(0.8 * rng.random()) * (_blur(image) - image)

    # Exposure: mean and contrast as photographs have them. One set of images in five spreads twice as much, for dark,
    # bright, flat and harsh ones. Sums are over integers, because the order of a float sum depends on the machine.
    deviation = _normal(rng, 2) * (2. if rng.random() < 0.2 else 1.)
    mean, contrast = 0.46 + 0.105 * float(deviation[0]), max(0.05, 0.2 + 0.065 * float(deviation[1]))
    luminance = (image[..., 0] + image[..., 1] + image[..., 2]) * f(1 / 3)
    levels = (luminance * f(4096)).astype(np.int64)
    mean_now = int(levels.sum()) / levels.size / 4096
    contrast_now = math.sqrt(max(int((levels * levels).sum()) / levels.size / 4096 ** 2 - mean_now * mean_now, 0.))
    gain = min(contrast / max(contrast_now, 1e-3), 3.)
    image += (luminance * f(gain - 1) + f(mean - gain * mean_now))[..., None]
    image += (rng.random(image.shape[:2], dtype=f) - f(0.5))[..., None] * f(0.035 * rng.random())

    # A film curve: straight in the middle, with shoulders instead of clipped shadows and lights.
    image = (image - f(0.5)) * f(1.05)
    power = image * image * f(4)
    power *= power
    image = image / np.sqrt(np.sqrt(power + f(1))) * f(1.04) + f(0.5)
    return np.clip(image * f(255) + f(0.5), 0, 255).astype(np.uint8)


def _texture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Noise over several octaves (H, W), float32: its amplitude falls slowly with frequency, as that of photographs."""
    f = np.float32
    octaves = max(2, min(6, min(height, width).bit_length() - 2))
    step = 1 << (octaves - 1)
    noise = rng.random((-(-height // step) + 1, -(-width // step) + 1), dtype=f) - f(0.5)
    amplitude = 1.
    for _ in range(octaves - 1):
        amplitude *= 0.85
        noise = _blur(noise.repeat(2, axis=0).repeat(2, axis=1))
        noise += (rng.random(noise.shape, dtype=f) - f(0.5)) * f(amplitude)
    return noise[:height, :width] * f(3)


def _blur(image: np.ndarray) -> np.ndarray:
    """Binomial filter (1, 2, 1) / 4 along both axes of (H, W, ...)."""
    f = np.float32
    padded = np.concatenate([image[:1], image, image[-1:]])
    image = (padded[:-2] + padded[2:]) * f(0.25) + image * f(0.5)
    padded = np.concatenate([image[:, :1], image, image[:, -1:]], axis=1)
    return (padded[:, :-2] + padded[:, 2:]) * f(0.25) + image * f(0.5)


def _normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Nearly normal numbers of unit variance, as sums of four uniform ones: exact arithmetic, and no far outliers."""
    u = rng.random((4, *shape))
    return (u[0] + u[1] + u[2] + u[3] - 2) * 1.7320508075688772
