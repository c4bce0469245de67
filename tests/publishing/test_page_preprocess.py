"""What a page does to an image before the network reads it, against timm's transforms: the same, bit by bit."""
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

import sformer

NODE = shutil.which('node')
SCRIPT = Path(sformer.__file__).parent / 'publishing' / 'templates' / 'page_preprocess.js'
RUN = '''
import fs from 'node:fs';
import {fromCanvas, preprocess} from './preprocess.mjs';
const cases = JSON.parse(fs.readFileSync('cases.json'));
cases.forEach(({how, width, height}, i) => {
  const data = new Uint8ClampedArray(fs.readFileSync(`${i}.rgba`));
  const {values} = preprocess(fromCanvas({data, width, height}, how.input_size[0]), how);
  fs.writeFileSync(`${i}.out`, new Uint8Array(values.buffer));
});
'''
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
SIZES = (97, 61), (61, 97), (500, 333), (31, 30), (64, 64), (1, 40)


def how(side=64, crop_pct=0.9, crop_mode='center', interpolation='bicubic', channels=3):
    height, width = side if isinstance(side, tuple) else (side, side)
    return dict(
        input_size=[channels, height, width], mean=MEAN[:channels], std=STD[:channels], interpolation=interpolation,
        crop_mode=crop_mode, crop_pct=crop_pct, scale_size=[int(s // crop_pct) for s in (height, width)])


WAYS = [
    how(), how(crop_pct=1.), how(crop_pct=0.875, interpolation='bilinear'), how(interpolation='lanczos'),
    how(interpolation='nearest'), how(interpolation='hamming'), how(interpolation='box'), how(crop_mode='squash'),
    how(crop_mode='border'), how(side=(48, 80)), how(side=(80, 48), crop_mode='squash'),
    how(side=(48, 80), crop_mode='border'), how(side=33, channels=1), how(side=8, crop_pct=1., channels=1),
    how(side=224, crop_pct=0.95)]


@pytest.mark.skipif(NODE is None, reason='node, which runs the script of the page, is not installed')
def test_pixels_are_those_of_timm(tmp_path, monkeypatch):
    """Rows first, as Pillow up to 12 resizes whatever it is; 13 begins with the columns of some tall images."""
    resize_at_once = Image.Image.resize

    def resize(image, size, *args, **kwargs):
        return resize_at_once(resize_at_once(image, (size[0], image.height), *args, **kwargs), size, *args, **kwargs)

    monkeypatch.setattr(Image.Image, 'resize', resize)
    rng = np.random.default_rng(0)
    cases, expected = [], []
    for index, way in enumerate(WAYS):
        for size in SIZES[:3] if index else SIZES:
            noise = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
            image = Image.fromarray(noise)
            transform = create_transform(
                input_size=tuple(way['input_size']), mean=way['mean'], std=way['std'], crop_pct=way['crop_pct'],
                crop_mode=way['crop_mode'], interpolation=way['interpolation'], is_training=False)
            expected.append(transform(image.convert('L' if way['input_size'][0] == 1 else 'RGB')))
            (tmp_path / f'{len(cases)}.rgba').write_bytes(image.convert('RGBA').tobytes())
            cases.append(dict(how=way, width=size[0], height=size[1]))
    (tmp_path / 'cases.json').write_text(json.dumps(cases))
    (tmp_path / 'run.mjs').write_text(RUN)
    shutil.copyfile(SCRIPT, tmp_path / 'preprocess.mjs')
    subprocess.run([NODE, 'run.mjs'], cwd=tmp_path, check=True, timeout=120)
    for i, values in enumerate(expected):
        found = torch.from_numpy(np.fromfile(tmp_path / f'{i}.out', np.float32)).view(values.shape)
        assert torch.equal(found, values), (cases[i], (found - values).abs().max())
