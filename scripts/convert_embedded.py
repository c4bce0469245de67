"""Convert a source network trained by train_source.py into the SFormer weights that ship with the package.

    python scripts/train_source.py digits -o build/digits
    python scripts/convert_embedded.py build/digits/digits.safetensors

Writes sformer/weights/sformer_nano.digits.safetensors and, beside it, the record of training and conversion.
"""
import json
import sys
from pathlib import Path

from safetensors.torch import save_file

import sformer
from sformer.conversion import create_source
from sformer.utils import file_hash, write_aside

ARGS = dict(img_size=8, patch_size=2, in_chans=1, embed_dim=64, depth=4, num_heads=4, num_classes=10)


def main(checkpoint: Path) -> None:
    name = 'sformer_nano.digits'
    source = create_source('vit_tiny_patch16_224', checkpoint, **ARGS)
    source.pretrained_cfg.update(crop_pct=1.0, interpolation='bilinear', mean=(0.5,), std=(0.5,))
    model = sformer.convert(source, 'digits', split='train')
    record = dict(conversion=model.conversion, training=json.loads(checkpoint.with_suffix('.json').read_text()))
    with write_aside(Path(sformer.__file__).parent / 'weights') as aside:
        weights = aside / f'{name}.safetensors'
        save_file(model.state_dict(), weights, metadata={'format': 'pt'})
        record['weights_sha256'] = file_hash(weights)
        (aside / f'{name}.json').write_text(json.dumps(record, indent=2) + '\n')
    print(name, sformer.evaluate(model, 'digits', 'test')['top1'])


if __name__ == '__main__':
    main(Path(sys.argv[1]))
