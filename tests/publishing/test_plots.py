"""Plots carry the numbers that they show."""
import io
import json

from PIL import Image

from sformer.publishing.plots import is_own_plot, render_plots


def test_plots_carry_their_numbers(record):
    plots = render_plots(record)
    assert plots.keys() == {'activity.png', 'accuracy.png'}
    assert render_plots(record) == plots, 'a plot that changes is a commit without a change'
    with Image.open(io.BytesIO(plots['accuracy.png'][1])) as image:
        assert json.loads(image.text['sformer'])['top1'] == {str(r['levels']): r['top1'] for r in record.curve}
    record.curve = []
    assert render_plots(record).keys() == {'activity.png'}


def test_own_plots_are_known(record, tmp_path):
    own, other, text = tmp_path / 'own.png', tmp_path / 'other.png', tmp_path / 'text.png'
    own.write_bytes(render_plots(record)['accuracy.png'][1])
    Image.new('RGB', (8, 8)).save(other)
    text.write_text('sformer')
    assert is_own_plot(own) and not is_own_plot(other) and not is_own_plot(text) and not is_own_plot(tmp_path)
