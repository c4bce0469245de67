"""Convert a source network trained by train_source.py into the SFormer weights that ship with the package.

    python scripts/train_source.py digits -o build
    python scripts/convert_embedded.py build/digits.safetensors
    export SFORMER_DATA=DIR                                     # has cifar10/, unless it is to come from the Hub
    python scripts/train_source.py vit_micro_cifar10 -o build
    python scripts/convert_embedded.py build/vit_micro_cifar10.safetensors
    python scripts/convert_embedded.py sformer_micro.cifar10    # the source inside again, as neurons are now

Writes sformer/saving/weights/NAME.safetensors and, beside it, the record of training and conversion. A better source
takes the place of an older one with these two commands; scripts/make_cards.py measures it.
"""
import dataclasses
import json
from pathlib import Path
from typing import Annotated

import timm
import torch
import typer
from safetensors.torch import save_file

import sformer
from sformer.conversion.sources import create_source, set_data_config_
from sformer.data.names import find_data
from sformer.files import file_hash, write_aside

# recipe of train_source.py -> entry of the zoo
ENTRIES = {
    'digits': 'sformer_nano.digits',
    'vit_micro_cifar10': 'sformer_micro.cifar10',
    'eva02_micro_cifar10': 'sformer_eva02_micro.cifar10',
}
WEIGHTS = Path(sformer.__file__).parent / 'saving/weights'
DATASETS = {'digits': 'digits', 'cifar10': 'uoft-cs/cifar10'}


def main(
        source: Annotated[str, typer.Argument(help='Checkpoint of train_source.py, or an entry to convert again')],
) -> None:
    again = source in ENTRIES.values()
    training = json.loads(WEIGHTS.joinpath(f'{source}.json').read_text())['training'] if again else \
        json.loads(Path(source).with_suffix('.json').read_text())
    recipe = training['recipe']
    name, dataset = ENTRIES[recipe['name']], DATASETS[recipe['data']]
    cfg = timm.get_pretrained_cfg(name)
    trained = dict(mean=cfg.mean, std=cfg.std, crop_pct=cfg.crop_pct, interpolation=cfg.interpolation)
    if again:
        network = sformer.source_of(timm.create_model(name, pretrained=True))
        set_data_config_(network, **trained)
    else:
        network = create_source(
            recipe['model'], Path(source), preprocessing=trained, **recipe['model_args']).network
    if recipe['bf16']:  # float16 has three more bits than the weights were trained to have
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.copy_(parameter.half())
    model = sformer.convert(network, dataset, split='train')
    used = dataclasses.replace(model.conversion.calibration, local_copy=find_data(dataset).folder is not None)
    conversion = dataclasses.replace(model.conversion, calibration=used)
    state = model.state_dict()
    if recipe['bf16']:
        state.update({key: parameter.detach().half() for key, parameter in model.named_parameters()})
    record = dict(sfn=dataclasses.asdict(model.sfn_config), conversion=conversion.to_dict(), training=training)
    with write_aside(WEIGHTS) as aside:
        weights = aside / f'{name}.safetensors'
        save_file(state, weights, metadata={'format': 'pt'})
        record['weights_sha256'], weights_size = file_hash(weights), weights.stat().st_size
        (aside / f'{name}.json').write_text(json.dumps(record, indent=2) + '\n')
    print(f'{name}: {used.num_images} images of {dataset}, weights of {(weights_size / 1e6):.1f} MB')


if __name__ == '__main__':
    typer.run(main)
