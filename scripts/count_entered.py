"""Count the files of the package that a command enters: those of which a function is called while it runs.

    python scripts/count_entered.py

Everything is imported before, so what only happens on import does not count; nor do generated methods of dataclasses.
Commands: `sformer convert` of weights in a file, and `sformer evaluate` of the result on a folder of images.
"""
import argparse
import importlib
import pkgutil
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

import sformer
from sformer.cli import main

PACKAGE = Path(sformer.__file__).parent
MODEL = 'test_vit'
CLASSES = ('first', 'second')


def entered(run: Callable[[], object]) -> list[str]:
    """Files of the package, by their paths in it, that a call enters in whatever thread of this process."""
    codes = set()

    def see(frame: FrameType, event: str, arg: object) -> None:
        if event == 'call':
            codes.add(frame.f_code)

    threading.setprofile(see)
    sys.setprofile(see)
    try:
        run()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    files = {Path(code.co_filename) for code in codes if code.co_name != '<module>'}
    return sorted(path.relative_to(PACKAGE).as_posix() for path in files if path.is_relative_to(PACKAGE))


def command(*arguments: object) -> list[str]:
    """Files that a command of `sformer` enters."""
    def run() -> None:
        sys.argv = ['sformer', *map(str, arguments)]
        try:
            main()
        except SystemExit as e:
            if e.code:
                raise
    return entered(run)


def write_inputs(folder: Path) -> tuple[Path, Path]:
    """A checkpoint with random weights, and a folder of images in class folders."""
    torch.manual_seed(0)
    weights = folder / 'weights.safetensors'
    save_file(timm.create_model(MODEL, num_classes=len(CLASSES)).state_dict(), weights)
    generator = np.random.default_rng(0)
    for name in CLASSES:
        (folder / 'images' / name).mkdir(parents=True)
        for i in range(4):
            pixels = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / 'images' / name / f'{i}.png')
    return weights, folder / 'images'


def count(folder: Path) -> dict[str, list[str]]:
    """Files that each command enters."""
    for module in pkgutil.walk_packages(sformer.__path__, 'sformer.'):
        if module.name != 'sformer.__main__':
            importlib.import_module(module.name)
    weights, images = write_inputs(folder)
    model = folder / 'model'
    converted = command(
        'convert', MODEL, '--checkpoint', weights, '--model-kwargs', f'num_classes={len(CLASSES)}', '--label-names',
        *CLASSES, '--mean', .5, .5, .5, '--std', .5, .5, .5, '--num-images', 8, '-o', model)
    return {'convert': converted, 'evaluate': command('evaluate', model, '--dataset', images)}


if __name__ == '__main__':
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    with tempfile.TemporaryDirectory() as name:
        for verb, files in count(Path(name)).items():
            print(f'sformer {verb}: {len(files)} files')
            print('\n'.join(f'    {path}' for path in files))
