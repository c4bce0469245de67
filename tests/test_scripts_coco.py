"""`scripts/coco.sh` on generated shapes in the folders and files of COCO 2017."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from detection_tools import write_coco
from safetensors.torch import save_file

import sformer

SCRIPT = Path(__file__).parents[1] / 'scripts' / 'coco.sh'


@pytest.mark.slow
def test_from_images_to_results(tmp_path):
    (tmp_path / 'coco' / 'annotations').mkdir(parents=True)
    for split, number in (('train2017', 6), ('val2017', 5)):
        write_coco(tmp_path / 'coco', split, number)
        (tmp_path / 'coco' / f'{split}.json').rename(tmp_path / 'coco' / 'annotations' / f'instances_{split}.json')
    torch.manual_seed(0)
    save_file(timm.create_model('test_vit2').state_dict(), tmp_path / 'weights.safetensors')
    environment = dict(
        os.environ, COCO='coco', CHECKPOINT='weights.safetensors', IMAGE_SIZE='64 96', CHANNELS='16', EPOCHS='2',
        BATCH_SIZE='2', NUM_IMAGES='2', LEVELS='8', NPROC='2', OUT='out', TRAIN_OPTIONS='--device cpu --seed 3',
        PYTHONPATH=str(Path(sformer.__file__).parents[1]), HF_HUB_OFFLINE='1',
        PATH=f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}')

    def run(**changes):
        return subprocess.run(['bash', SCRIPT, 'test_vit2'], cwd=tmp_path, env={**environment, **changes},
                              capture_output=True, text=True, timeout=250)
    done = run()
    assert done.returncode == 0, done.stderr
    model = tmp_path / 'out' / 'n8'
    result = json.loads((model / 'val2017.json').read_text())
    assert (result['num_images'], result['world_size'], result['problems']) == (5, 2, [])
    assert {'boxes', 'masks', 'source_boxes', 'source_masks'} <= result.keys()
    record = json.loads((model / 'config.json').read_text())['sformer']['calibration']
    assert (record['name'], record['split'], record['num_images']) == ('coco', 'train2017', 2)
    assert {path.name for path in model.iterdir()} == {'config.json', 'model.safetensors', 'val2017.json'}
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / 'out').rglob('*')}
    assert run().returncode == 0  # nothing is left to do
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / 'out').rglob('*')} == before


def test_it_says_what_it_needs(tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != 'COCO'}
    done = subprocess.run(['bash', SCRIPT], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and 'COCO: is to name the folder of COCO 2017' in done.stderr
    assert not [*tmp_path.iterdir()]
