"""Cases of `check_faults.py`: work of hours that is ended and goes on, and files that fill the memory or hang."""
import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from fault_tools import KILLED, Case, wait_for

LITTLE_MEMORY = ('import resource, sformer.cli, sys; resource.setrlimit(resource.RLIMIT_AS, (7 << 30, 7 << 30)); '
                 'sformer.cli.main(sys.argv[1:])')
DIGITS = ['--dataset', 'digits', '--split', 'train']
STEPS = 500
DISTILL = ['-m', 'sformer', 'distill', '{model}', *DIGITS, '--num-images', '64', '--steps', str(STEPS),
           '--batch-size', '8', '-o', '{folder}/trained']
TRIALS = 8
SEARCH = ['-m', 'sformer', 'search', '{model}', *DIGITS, '--num-images', '64', '--num-calibration', '32',
          '--budget', str(TRIALS), '--storage', '{folder}/trials', '--results-file', '{folder}/points.json']
GO_ON = 'interrupted. The same command with --resume continues'
SIDE = 64  # pixels of an image
FAR, NAN = 1e9, float('nan')
SQUARE = [8, 8, 40, 8, 40, 40, 8, 40]
# what an annotation has for a mask, which pycocotools hangs at, or fills the memory with, and what is said instead
MASKS: dict[str, tuple[object, str]] = {
    'a polygon of 1e9': ([[*SQUARE[:7], FAR]], 'has a polygon with 1000000000.0'),
    'a polygon of NaN': ([[*SQUARE[:7], NAN]], 'has a polygon with nan'),
    'a polygon of far away': ([[x + 1e6 for x in SQUARE]], 'has a polygon far outside of its image'),
    'runs beyond the image': (dict(size=[SIDE, SIDE], counts=[10, 10 ** 9]), 'runs add up to 1000000010 pixels'),
    'runs of more than 32 bits': (dict(size=[SIDE, SIDE], counts=[2 ** 32 + 96, 4000]), 'runs add up to'),
    'runs that are too few': (dict(size=[SIDE, SIDE], counts=[100, 5]), 'runs add up to 105 pixels'),
    'lists in lists': (json.loads('[' * 900 + ']' * 900), 'has a mask that is no list of polygons'),
}


def once(done: Callable[[Path], bool], number: int) -> Callable[[psutil.Process, Path], None]:
    """Send a signal when that much is done."""
    def happen(process: psutil.Process, folder: Path) -> None:
        wait_for(lambda: done(folder), 600)
        process.send_signal(number)
    return happen


def steps(number: int) -> Callable[[Path], bool]:
    return lambda folder: f'step {number}:' in (folder / 'out').read_text()


def is_kept(folder: Path) -> bool:
    return (folder / 'trained' / 'training.safetensors').exists()


def trials(number: int) -> Callable[[Path], bool]:
    """Whether so many trials have ended, and another one is under way."""
    def done(folder: Path) -> bool:
        journal = folder / 'trials'
        return journal.exists() and journal.read_text().count('forward_passes') >= number
    return done


def go_on(args: list[str], env: dict[str, str], *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *args, *more], env=env, capture_output=True, text=True)


def trained_alike(args: list[str], env: dict[str, str], shared: dict[str, Any]) -> str:
    """What differs in the weights of a training that goes on from those of one without faults."""
    from sformer.files import read_safetensors, state_hash
    resumed = go_on(args, env, '--resume')
    if resumed.returncode or f'step {STEPS}:' not in resumed.stdout or 'step 100:' in resumed.stdout:
        return f'resumed with exit code {resumed.returncode}: {resumed.stdout[-300:]} {resumed.stderr[-300:]}'
    found = state_hash(read_safetensors(Path(args[-1], 'model.safetensors')))
    return '' if found == shared['trained'] else 'the weights differ from those of a training without faults'


def searched_alike(args: list[str], env: dict[str, str], shared: dict[str, Any]) -> str:
    """What a search that goes on lacks of one without faults."""
    resumed = go_on(args, env)
    if resumed.returncode:
        return f'resumed with exit code {resumed.returncode}: {resumed.stderr[-300:]}'
    result = json.loads(Path(args[-1]).read_text())
    origins = [point['origin'] for point in result['points']]
    passes = 64 + TRIALS * (64 + 32)
    if len(origins) != TRIALS or origins.count('closed form') != 5 or result['forward_passes'] != passes:
        return f'{origins}, {result["forward_passes"]} images through a network, not {passes}'
    return ''


JOBS = [
    Case('distill, Ctrl-C', DISTILL, GO_ON, 30, once(steps(100), signal.SIGINT), rest=30, then=trained_alike),
    Case('distill, told to end', DISTILL, GO_ON, 30, once(steps(300), signal.SIGTERM), rest=30,
         then=trained_alike),
    Case('distill, killed', DISTILL, KILLED, 5, once(is_kept, signal.SIGKILL), then=trained_alike),
    Case('distill, disk full', [*DISTILL[:-1], '{small}/trained'], '{small}.*: No space left on device', 600,
         mount=('200k', '{small}')),
    Case('search, Ctrl-C', SEARCH, 'interrupted. The same command continues', 30, once(trials(2), signal.SIGINT),
         rest=30, then=searched_alike),
    Case('search, killed', SEARCH, KILLED, 5, once(trials(3), signal.SIGKILL), then=searched_alike),
    *(Case(f'COCO, {name}', [
        '-c', LITTLE_MEMORY, 'detect', 'train', '--backbone', 'vit_tiny_patch16_224', '--masks', '--data',
        f'{{coco}}/{place}', '-o', '{folder}/d'], f'train.json: annotation 1 .*{re.escape(said)}', 300)
      for place, (name, (_, said)) in enumerate(MASKS.items())),
]


def make_jobs(folder: Path, model: str | Path) -> dict[str, str]:
    """What these cases share: weights of a training without faults, and files in COCO format."""
    from PIL import Image

    from sformer.files import read_safetensors, state_hash
    names = dict(model=str(model), folder=str(folder))
    command = [re.sub(r'\{(\w+)\}', lambda m: names[m[1]], arg) for arg in DISTILL]
    subprocess.run([sys.executable, *command], check=True, capture_output=True)
    for place, (mask, _) in enumerate(MASKS.values()):
        root = folder / 'coco' / str(place)
        (root / 'train').mkdir(parents=True)
        Image.new('RGB', (SIDE, SIDE), (90, 90, 90)).save(root / 'train' / '0.png')
        (root / 'train.json').write_text(json.dumps(dict(
            images=[dict(id=1, file_name='0.png', width=SIDE, height=SIDE)], categories=[dict(id=1, name='square')],
            annotations=[dict(id=1, image_id=1, category_id=1, bbox=[8, 8, 32, 32], segmentation=mask)])))
    return dict(trained=state_hash(read_safetensors(folder / 'trained' / 'model.safetensors')),
                coco=str(folder / 'coco'))
