"""`docs/hero.png` shows what model_cards/ has measured."""
import json
from pathlib import Path

from sformer.files import png_values

ROOT = Path(__file__).parents[1]


def test_the_hero_shows_what_was_measured():
    """Else: python scripts/make_hero.py"""
    path = ROOT / 'docs' / 'hero.png'
    curves = png_values(path)['curves']
    recorded = [json.loads(file.read_text())['curve'] for file in (ROOT / 'model_cards').glob('*.json')]
    expected = [[{key: point[key] for key in ('levels', 'top1', 'source_top1', 'num_images')} for point in curve]
                for curve in recorded if curve]
    assert len(curves) == len(expected) == 3
    assert all(curve in expected for curve in curves.values())
    assert path.stat().st_size < 300_000
    assert '(docs/hero.png)' in (ROOT / 'README.md').read_text()
