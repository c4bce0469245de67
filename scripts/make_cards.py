"""Measure the models that ship with the package, and write their cards, plots and records to model_cards/.

    python scripts/make_cards.py [NAME ...]
    python scripts/make_cards.py --render-only                     # after a change of the template
    SFORMER_DATA=DIR python scripts/make_cards.py                  # DIR has cifar10/, a copy of the data set
    python scripts/make_list.py                                    # afterwards: what `sformer list` shows

NAME.json holds all that was measured; NAME.md and its plots say that and nothing else. `sformer list` shows the result
that is noted beside the weights.
"""
import dataclasses
import json
from pathlib import Path
from typing import Annotated, List, Optional

import timm
import typer

import sformer
from sformer.data.names import find_data
from sformer.errors import SFormerError
from sformer.evaluation import EvaluationConfig, evaluate_all
from sformer.files import state_hash, write_json
from sformer.neurons import SFNConfig
from sformer.publishing.cards import shell, write_card
from sformer.publishing.model_record import ModelRecord

MODEL_CARDS = Path(__file__).parents[1] / 'model_cards'
WEIGHTS = Path(sformer.__file__).parent / 'saving/weights'
CURVE = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 63)
COARSE_CURVE = (4, 8, 32, 63)  # for networks that take minutes


def embedded() -> List[str]:
    """Names of the models that ship with the package."""
    return sorted(path.stem for path in WEIGHTS.glob('*.safetensors'))


def measure(
        name: str,
        note: Optional[str] = None,
        num_images: Optional[int] = None,
) -> ModelRecord:
    """Evaluate a model on the test images of its dataset, and conversions of its source with other N.

    Args:
        name: Name of the model.
        note: What the card has to say about it.
        num_images: Size of a random subset of the test images; all of them if None.
    """
    shipped = json.loads((WEIGHTS / f'{name}.json').read_text())
    sfn, used = shipped['sfn'], shipped['conversion']['calibration']
    model = timm.create_model(name, pretrained=True).eval()
    cfg, source = model.pretrained_cfg, sformer.source_of(model)
    levels = CURVE if sum(p.numel() for p in model.parameters()) < 1e6 else COARSE_CURVE
    models = {n: sformer.convert(
        source, used['name'], SFNConfig(**dict(sfn, levels=n)), split=used['split'],
        num_images=used['num_images'], seed=used['seed']) for n in levels if n != sfn['levels']}
    models[sfn['levels']] = model
    measured = evaluate_all([*models.values()], EvaluationConfig(
        dataset=used['name'], split='test', num_images=num_images))
    results = {
        n: {key: value for key, value in result.items() if 'second' not in key}
        for n, result in zip(models, measured, strict=True)}
    result = results[sfn['levels']]
    keys = ('dataset', 'dataset_revision', 'split', 'num_images', 'top1', 'source_top1', 'agreement', 'activity',
            'weights_sha256')
    part = ['--num-images', num_images] if num_images else []
    command = shell('python', 'scripts/make_cards.py', name, *part)
    copied = find_data(used['name']).folder is not None
    return ModelRecord(
        name=name, load_name=name, architecture=result['model'], weights_sha256=state_hash(model.state_dict()),
        input_size=list(cfg['input_size']), num_classes=cfg['num_classes'], conversion=shipped['conversion'],
        sfn=sfn, fit=shipped['conversion']['fit'], training=shipped.get('training'), license=cfg['license'],
        evaluations={'eval.json': dict(result, model=name, command=command)},
        curve=[dict(levels=n, **{key: results[n][key] for key in keys}) for n in levels],
        curve_command=command, dataset_ids={used['name']: used['name']} if copied else {},
        note=note if copied else None)


def note_result(record: ModelRecord) -> None:
    """Note beside the weights what `sformer list` shows."""
    path = WEIGHTS / f'{record.name}.json'
    shipped, result = json.loads(path.read_text()), record.evaluations['eval.json']
    shipped['evaluation'] = {key: result[key] for key in ('num_images', 'top1', 'source_top1', 'weights_sha256')}
    write_json(path, shipped)


def check_current(record: ModelRecord) -> None:
    """Raise SFormerError if a record is not of what ships now."""
    shipped = json.loads((WEIGHTS / f'{record.name}.json').read_text())
    now = state_hash(timm.create_model(record.name, pretrained=True).state_dict())
    if (record.weights_sha256, record.conversion) != (now, shipped['conversion']):
        raise SFormerError(f'the record of {record.name} is of other weights than ship now: measure it again, without '
                           f'--render-only.')


def main(
        names: Annotated[Optional[List[str]], typer.Argument(help='All that ship with the package if none')] = None,
        output: Annotated[Path, typer.Option('--output', '-o')] = MODEL_CARDS,
        note: Annotated[Optional[str], typer.Option(help='What cards have to say of copies of data sets')] = None,
        num_images: Annotated[Optional[int], typer.Option(help='Random subset of the test images')] = None,
        render_only: Annotated[bool, typer.Option('--render-only', help='Measure nothing')] = False,
) -> None:
    for name in names or embedded():
        if name not in embedded():
            raise SFormerError(f'no model {name!r} ships with the package, only {", ".join(embedded())}.')
        path = output / f'{name}.json'
        if not render_only:
            write_json(path, dataclasses.asdict(measure(name, note, num_images)))
        record = ModelRecord(**json.loads(path.read_text()))
        check_current(record)
        if output == MODEL_CARDS:
            note_result(record)
        print(write_card(record, output))


if __name__ == '__main__':
    try:
        typer.run(main)
    except SFormerError as e:
        raise SystemExit(f'error: {e}') from None
