"""Plots carry the numbers that they show."""
import io
import json

import pytest
from PIL import Image

from sformer.publishing import plots as plots_module
from sformer.publishing.plots import is_own_plot, plot_accuracy, plot_activity, render_plots
from sformer.publishing.profile_plots import COLOURS, plot_energy


def test_plots_carry_their_numbers(record):
    plots = render_plots(record)
    assert plots.keys() == {'activity.png', 'accuracy.png'}
    assert render_plots(record) == plots, 'a plot that changes is a commit without a change'
    with Image.open(io.BytesIO(plots['accuracy.png'][1])) as image:
        assert json.loads(image.text['sformer'])['top1'] == {str(r['levels']): r['top1'] for r in record.curve}
    record.curve = []
    assert render_plots(record).keys() == {'activity.png'}
    record.sfn = {}
    assert not render_plots(record), 'shares of how many levels'


def test_own_plots_are_known(record, tmp_path):
    own, other, text = tmp_path / 'own.png', tmp_path / 'other.png', tmp_path / 'text.png'
    own.write_bytes(render_plots(record)['accuracy.png'][1])
    Image.new('RGB', (8, 8)).save(other)
    text.write_text('sformer')
    assert is_own_plot(own) and not is_own_plot(other) and not is_own_plot(text) and not is_own_plot(tmp_path)


def test_what_is_in_no_block_has_a_column_of_its_own(monkeypatch):
    """The patch embedding stood in a column called head."""
    figures = []
    monkeypatch.setattr(plots_module, 'png', lambda figure, values: figures.append(figure) or b'')
    plot_activity({'patch_embed.proj.neuron': 1., 'blocks.0.attn.qkv.neuron': .5, 'blocks.1.attn.qkv.neuron': .4,
                   'attn_pool.q.neuron': .3, 'head.neuron': .2})
    plot_activity({'backbone.vit.patch_embed.proj.neuron': 1., 'backbone.vit.blocks.0.attn.qkv.neuron': .5,
                   'backbone.pyramid.2.neuron': .4, 'rpn.head.conv.neuron': .3})
    columns = [[label.get_text() for label in figure.axes[0].get_xticklabels()] for figure in figures]
    assert columns == [['patch_embed', '0', '1', 'attn_pool', 'head'], ['patch_embed', '0', 'pyramid', 'rpn']]
    assert figures[0].axes[0].images[0].get_array()[0].tolist() == [1., None, None, None, None]


@pytest.mark.parametrize('accuracy, source, limits', [
    ({4: 80., 8: 90.}, 100., (79, 101)), ({4: 98., 8: 99.}, 98., (96, 101)), ({32: 70.}, 60., (59.5, 70.5)),
    ({32: 70.}, 70., (67.5, 72.5))])
def test_curves_are_seen_whole_and_noise_is_no_cliff(monkeypatch, accuracy, source, limits):
    figures = []
    monkeypatch.setattr(plots_module, 'png', lambda figure, values: figures.append(figure) or b'')
    plot_accuracy(accuracy, source)
    axes = figures[0].axes[0]
    assert axes.get_ylim() == pytest.approx(limits)
    assert [label.get_text() for label in axes.get_xticklabels()] == [str(n) for n in accuracy]
    line, curve, *_ = axes.get_lines()  # and caps of error bars
    assert {*line.get_ydata()} == {source} and [*curve.get_xydata().flatten()] == [
        number for point in accuracy.items() for number in point]


def test_a_row_for_each_account():
    parts = {'products': next(iter(COLOURS))}
    heights = []
    for count in (1, 3, 5):
        names = ['quantised', *map(str, range(count - 1))]
        account = {name: dict(products=1., total=1., low=0.5, high=1.5) for name in names}
        with Image.open(io.BytesIO(plot_energy(account, parts))) as image:
            heights.append(image.height)
    assert heights[2] - heights[1] == heights[1] - heights[0] > 50
