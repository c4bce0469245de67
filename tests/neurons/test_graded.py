"""Graded-spike coding of pixels: lossless on 8-bit images, under any normalisation."""
import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from neuron_tools import prop, rng, site

from sformer.neurons import GradedCoding, PatchCoding

means = st.floats(0, 1)
deviations = st.floats(0.05, 2)


@prop
@given(st.lists(st.tuples(means, deviations), min_size=1, max_size=4))
def test_graded_coding_is_lossless_on_every_8_bit_value(channels):
    mean_, std = (torch.tensor(v, dtype=torch.float64) for v in zip(*channels, strict=True))
    coding = GradedCoding(len(channels))
    coding.set_range((-mean_ / std).float(), ((1 - mean_) / std).float())
    pixels = torch.arange(256, dtype=torch.float64).view(1, 1, 16, 16).expand(1, len(channels), 16, 16)
    x = ((pixels / 255 - mean_[:, None, None]) / std[:, None, None]).float()
    spikes = coding.encode(x)
    assert spikes.levels.dtype == torch.int8 and torch.equal(spikes.levels.double() + 128, pixels)
    torch.testing.assert_close(coding(x), x, rtol=1e-5, atol=1e-5)


@prop
@given(st.tuples(means, deviations), st.lists(st.floats(-2. ** 99, 2. ** 99, width=32), max_size=8))
def test_output_is_the_decoded_spikes_bit_for_bit(normalisation, currents):
    mean_, std = normalisation
    coding = GradedCoding(1)
    coding.set_range(torch.tensor([-mean_ / std]), torch.tensor([(1 - mean_) / std]))
    ties = (torch.arange(-129, 130) + 0.5) * coding.step.flatten() + coding.center.flatten()
    x = torch.cat([torch.tensor(currents + [0., -0., 1e-40]), ties, 3 * torch.randn(50, generator=rng(0))])
    x = x.view(1, 1, 1, -1)
    assert torch.equal(coding(x), coding.encode(x).decode())


@pytest.mark.parametrize('channels_last', [True, False])
def test_flat_patches_are_coded_as_the_pixels_that_they_are_of(channels_last):
    mean_, std = torch.tensor([0.5, 0.2, 0.7]), torch.tensor([0.3, 0.5, 0.2])
    pixels = torch.randint(0, 256, (2, 5, 4, 3), generator=rng(0))  # images, patches, pixels of a patch, channels
    x = (pixels / 255 - mean_) / std
    flat = [(t if channels_last else t.mT).flatten(2) for t in (x, pixels)]
    coding = PatchCoding(3, 4, channels_last, gain=2., offset=-1.)
    coding.set_range(-mean_ / std, (1 - mean_) / std)
    currents = 2 * flat[0] - 1
    assert torch.equal(coding.encode(currents).levels.long() + 128, flat[1])
    torch.testing.assert_close(coding(currents), currents, rtol=1e-5, atol=1e-5)


def test_graded_coding_saturates_at_its_range():
    coding = GradedCoding(1)
    coding.set_range(torch.tensor([-2.]), torch.tensor([3.]))
    x = torch.tensor([-100., -2., 3., 100.]).view(1, 1, 1, 4).requires_grad_()
    assert coding.encode(x).levels.flatten().tolist() == [-128, -128, 127, 127]
    out = coding(x)
    torch.testing.assert_close(out.flatten(), torch.tensor([-2., -2., 3., 3.]))
    out.sum().backward()
    assert x.grad.flatten().tolist()[::3] == [0, 0]
    assert coding.calibrated


def test_graded_coding_is_straight_through_inside_of_its_range():
    coding = GradedCoding(3)
    x = (torch.rand(2, 3, 4, 4, generator=rng(0)) * 1.9 - 0.95).requires_grad_()
    upstream = torch.randn(x.shape, generator=rng(1))
    out = coding(x)
    out.backward(upstream)
    assert torch.equal(x.grad, upstream)
    with torch.no_grad():
        assert torch.equal(coding(x), out)


def test_every_pixel_value_has_a_gradient():
    x = ((torch.arange(256) / 255 - 0.5) / 0.5).view(1, 1, 16, 16).requires_grad_()
    GradedCoding(1)(x).sum().backward()
    assert (x.grad == 1).all()


def test_graded_coding_covers_unit_std_by_default():
    pixels = torch.arange(256).view(1, 1, 16, 16)
    assert torch.equal(GradedCoding(1).encode((pixels / 255 - 0.5) / 0.5).levels + 128., pixels.float())


@pytest.mark.parametrize('low, high', [(1., 1.), (1., 0.), (math.nan, 1.), (0., math.inf)])
def test_graded_coding_refuses_an_empty_range_and_changes_nothing(low, high):
    coding = GradedCoding(1)
    before = {k: v.clone() for k, v in coding.state_dict().items()}
    with pytest.raises(ValueError, match='step|center'):
        coding.set_range(torch.tensor([low]), torch.tensor([high]))
    assert all(torch.equal(v, before[k]) for k, v in coding.state_dict().items())


def test_images_of_another_normalisation_widen_the_range():
    coding = GradedCoding(2)
    x = torch.rand(4, 2, 8, 8, generator=rng(0)) * 6 - 3
    coding.fit(site(x, (2, 1, 1)))
    assert ((coding(x) - x).abs() <= 0.51 * coding.step).all() and coding.calibrated


def test_dark_images_leave_the_code_lossless():
    coding = GradedCoding(2)
    before = coding.step.clone()
    coding.fit(site(torch.rand(4, 2, 8, 8, generator=rng(0)) * 0.1, (2, 1, 1)))
    torch.testing.assert_close(coding.step, before, rtol=1e-5, atol=0)


def told(caplog):
    return [record.getMessage() for record in caplog.records if record.name.startswith('sformer')]


def test_images_of_another_normalisation_are_told_of_once(caplog):
    coding = GradedCoding(3)
    inside = torch.tensor([-1., 1.]).expand(2, 3, 4, 2)
    coding(inside * 1.1)
    assert not told(caplog)
    coding(inside * 2.5)
    coding(inside * 3)
    message, = told(caplog)
    assert 'values from -2.5 to 2.5 in channel 0, where mean and std of pretrained_cfg allow -1 to 1' in message


def test_watching_for_another_normalisation_gets_in_nobodys_way(caplog):
    wide = 3 * torch.ones(2, 3, 4, 4)
    coding = GradedCoding(3)
    torch.fx.symbolic_trace(coding)
    torch.vmap(coding)(wide[None])
    torch.compile(coding, backend='eager', fullgraph=True)(wide)
    torch.export.export(coding, (wide,))
    coding(wide[:0])
    copy.deepcopy(coding).to('meta')(wide.to('meta'))
    assert not told(caplog)
    for _ in range(20):  # and after some batches, it ends
        coding(wide / 4)
    coding(wide)
    assert not told(caplog)


def test_calibration_images_of_another_range_are_told_of(caplog):
    coding = GradedCoding(2)
    coding.fit(site(torch.tensor([-1., 1.]).expand(2, 2, 4, 2).clone(), (2, 1, 1)))
    assert not told(caplog)
    coding.fit(site(torch.tensor([0., 255.]).expand(2, 2, 4, 2).clone(), (2, 1, 1)))
    message, = told(caplog)
    assert 'values from 0 to 255 in channel 0, where mean and std of pretrained_cfg allow -1 to 1' in message


@pytest.mark.parametrize('channels', [1, 2, 4])
def test_images_of_other_channels_are_refused(channels):
    coding, x = GradedCoding(3), torch.zeros(2, channels, 4, 4)
    for code in (coding, coding.encode):
        with pytest.raises(RuntimeError):
            code(x)
