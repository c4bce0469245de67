"""Detections are drawn where they are, in the colour of their category."""
import types

import pytest
import torch

from sformer.detection import DetectorConfig
from sformer.detection.drawing import draw_detections, enlarged

colormaps = pytest.importorskip('matplotlib').colormaps
SIDE, TOP, BOTTOM = 64, 28, 59  # of a square and the box in it: above is room for a text


def drawn(labels, scores, names=80, masks=False, **kwargs):
    """What is drawn over a black image, with a detection in each square of a column of them, (3, n * SIDE, SIDE) times
    how many times as large it is drawn, which is the second thing returned."""
    config = DetectorConfig('test_vit2', {10 * i: f'n{i}' for i in range(1, names + 1)})
    tops = torch.arange(len(labels)) * SIDE
    boxes = torch.stack([torch.full_like(tops, 4), tops + TOP, torch.full_like(tops, 35), tops + BOTTOM], 1).float()
    found = dict(boxes=boxes, labels=torch.tensor(labels), scores=torch.tensor(scores))
    black = torch.zeros(3, max(1, len(labels)) * SIDE, SIDE)
    if masks:
        found['masks'] = torch.zeros(len(labels), 1, *black.shape[1:])
        for top, mask in zip(tops.tolist(), found['masks'], strict=True):
            mask[0, top + 50:top + 56, 10:30] = 0.6
    return draw_detections(types.SimpleNamespace(config=config), black, found, **kwargs), enlarged(black)[1]


def colour(number):
    return [int(value) for value in colormaps['tab10'](number % 10, bytes=True)[:3]]


@pytest.mark.parametrize('masks', [False, True])
def test_more_categories_and_objects_than_colours(masks):
    labels = [1, 2, 10, 11, 12, 80, 7, 7, 21, 30, 31, 45]
    pixels, times = drawn(labels, [0.9] * len(labels), masks=masks)
    assert pixels.dtype == torch.uint8
    for i, label in enumerate(labels):
        edge = pixels[:, (SIDE * i + BOTTOM) * times, 20 * times]  # the lower one, which no text covers
        assert edge.tolist() == colour(label - 1)
        inside = pixels[:, (SIDE * i + 53) * times, 20 * times].float()  # of a mask, in a colour of its own
        torch.testing.assert_close(inside, 0.45 * masks * torch.tensor(colour(i)).float(), atol=2, rtol=0)


def test_scores_that_are_too_low():
    pixels, times = drawn([1, 2, 3], [0.7, 0.5, 0.49], min_score=0.5)
    edges = [pixels[:, (SIDE * i + BOTTOM) * times, 20 * times].tolist() for i in range(3)]
    assert edges == [colour(0), colour(1), [0, 0, 0]]
    assert not drawn([1, 2], [0.2, 0.1])[0].any() and not drawn([], [])[0].any()


@pytest.mark.parametrize('count, names, texts', [(40, 80, True), (41, 80, False), (3, 2, True), (3, 1, False)])
def test_texts_stand_where_they_hide_little(count, names, texts):
    pixels, times = drawn([1] * count, [0.9] * count, names)
    above = pixels[:, :TOP * times - 2, 6 * times:34 * times]  # of the first box
    assert bool(above.any()) == texts
