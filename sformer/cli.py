"""Command line: `sformer convert | evaluate | compare | list | demo | publish | card`."""
import ast
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, Dict, List, Optional

import typer

from .errors import SFormerError

__all__ = ['app', 'main']

app = typer.Typer(
    add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
    help='Single-timestep spiking vision transformers from timm models, training-free.')

USAGE_ERROR: Any = typer.BadParameter.__mro__[1]  # typer brings its own click and exports no more than this

# options that take several values up to the next option, as in timm's own scripts
MULTI_VALUE = ('--model-kwargs', '--mean', '--std')
AMP_DTYPES = ('bfloat16', 'bf16', 'float16', 'fp16', 'half')

Dataset = "digits, a folder of parquet files, an image folder or a Hugging Face dataset id"


def main(argv: Optional[List[str]] = None) -> None:
    """Entry point: mistakes of the user end in one line on stderr and a non-zero exit code."""
    import logging
    for name in ('huggingface_hub', 'datasets'):  # retries, failed reads; the error that ends them is ours
        logging.getLogger(name).setLevel(logging.CRITICAL)
    args = spread(sys.argv[1:] if argv is None else argv)
    if '' in args:
        fail('an argument is empty; is a variable of the shell unset?', 2)
    try:
        code = app(args or ['--help'], standalone_mode=False)
    except SFormerError as e:
        fail(str(e))
    except (typer.Abort, KeyboardInterrupt):
        code = 130
    except USAGE_ERROR as e:
        fail(f'{e.format_message().rstrip(".")}. Try --help.', 2)
    except OSError as e:
        fail(f'{e.filename or "file"}: {e.strerror or e}')
    if code == 130:  # typer turns Ctrl-C into this exit code
        fail('interrupted; nothing was changed.', 130)
    sys.exit((code if isinstance(code, int) else 0) if args else 2)


def fail(message: str, code: int = 1) -> None:
    print(f'sformer: error: {" ".join(message.split())}', file=sys.stderr)
    sys.exit(code)


def spread(args: List[str]) -> List[str]:
    """`--std a b c` -> `--std a --std b --std c`; `--amp bf16` -> `--amp --amp-dtype bf16`."""
    out: List[str] = []
    option: Optional[str] = None
    counts: Dict[str, int] = {}
    for arg in args:
        if arg in MULTI_VALUE:
            option = arg
            counts.setdefault(arg, 0)
        elif arg in AMP_DTYPES and out[-1:] == ['--amp']:
            out += ['--amp-dtype', arg]
        elif arg.startswith('-') and not _is_number(arg):
            option = None
            out.append(arg)
        elif option:
            out += [option, arg]
            counts[option] += 1
        else:
            out.append(arg)
    for option, count in counts.items():
        if not count:
            fail(f'{option} has no values; is a variable of the shell unset?', 2)
    return out


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def parse_kwargs(pairs: Optional[List[str]]) -> Dict[str, Any]:
    """`['img_size=32', 'global_pool=avg']` -> `{'img_size': 32, 'global_pool': 'avg'}`."""
    from .model_config import factory_arguments
    kwargs = {}
    for pair in pairs or []:
        key, equals, value = pair.partition('=')
        if not equals or not key.isidentifier():
            raise SFormerError(f'--model-kwargs takes key=value pairs, got {pair!r}.')
        if key in factory_arguments() | {'name', 'checkpoint', 'allow_pickle', 'device', 'dtype'}:
            raise SFormerError(f'--model-kwargs is for arguments of the network, which {key} is not.')
        try:
            kwargs[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            kwargs[key] = value
    return kwargs


def command_line() -> str:
    return shlex.join(['sformer', *sys.argv[1:]])


@app.command()
def convert(
        source: Annotated[str, typer.Argument(help='timm model to convert')],
        output: Annotated[Path, typer.Option('--output', '-o', help='Folder for the SFormer')],
        checkpoint: Annotated[Optional[Path], typer.Option(
            help='Weights of the source (safetensors); its published ones if not given')] = None,
        model_kwargs: Annotated[Optional[List[str]], typer.Option(help='key=value ... for timm.create_model')] = None,
        calibration: Annotated[str, typer.Option(help=f'dead-leaves (generated images), {Dataset}')] = 'dead-leaves',
        split: Annotated[Optional[str], typer.Option(help='Split of the calibration dataset')] = None,
        num_images: Annotated[int, typer.Option(min=1, help='Number of calibration images')] = 256,
        seed: Annotated[int, typer.Option(help='Seed of the choice of calibration images')] = 0,
        batch_size: Annotated[int, typer.Option(min=1)] = 32,
        levels: Annotated[int, typer.Option(help='Thresholds N per branch, 1 to 127')] = 32,
        fire: Annotated[str, typer.Option(help='uniform, quadratic, power2 or density')] = 'uniform',
        attention_fire: Annotated[str, typer.Option(help='Fire function of the softmax')] = 'quadratic',
        firing: Annotated[str, typer.Option(help='round, or floor as in the paper')] = 'round',
        dead_zone: Annotated[float, typer.Option(help='No spike below this many steps')] = 0.,
        scale: Annotated[float, typer.Option(help='Scaling factor lambda on top of all thresholds')] = 1.,
        estimator: Annotated[str, typer.Option(help='Threshold estimator: mse, quantile or max')] = 'mse',
        quantile: Annotated[float, typer.Option(help='Share of currents that the quantile estimator covers')] = 0.999,
        mean: Annotated[Optional[List[float]], typer.Option(help='Mean of the normalisation, one per channel')] = None,
        std: Annotated[Optional[List[float]], typer.Option(help='Std of the normalisation, one per channel')] = None,
        crop_pct: Annotated[Optional[float], typer.Option(help='Centre crop')] = None,
        interpolation: Annotated[Optional[str], typer.Option(help='Resize method: bicubic, bilinear ...')] = None,
        allow_pickle: Annotated[bool, typer.Option('--allow-pickle', help='Load a pickled checkpoint')] = False,
        overwrite: Annotated[bool, typer.Option('--overwrite', help='Replace a model that is there')] = False,
):
    """Convert a trained timm model into an SFormer, without training."""
    from .conversion import convert as convert_model
    from .neurons import SFNConfig
    from .saving import check_output, save_model
    from .sources import create_source, set_data_config_
    try:
        config = SFNConfig(
            levels=levels, fire=fire, attention_fire=attention_fire, firing=firing, dead_zone=dead_zone, scale=scale,
            estimator=estimator, quantile=quantile)
    except ValueError as e:
        raise SFormerError(str(e)) from None
    check_output(output, overwrite)
    model = create_source(source, checkpoint, allow_pickle, **parse_kwargs(model_kwargs))
    set_data_config_(model, mean=mean, std=std, crop_pct=crop_pct, interpolation=interpolation)
    model = convert_model(
        model, calibration, config, split=split, num_images=num_images, batch_size=batch_size, seed=seed, inplace=True)
    model.conversion['command'] = command_line()
    save_model(model, output, overwrite)
    used = model.conversion['calibration']
    print(f'{source} -> {model.pretrained_cfg["architecture"]}: N = {levels}, calibrated on {used["num_images"]} '
          f'{used["name"]} images, saved to {output}')


# options that `evaluate` and `compare` share; names as in timm's scripts
ImageSize = Annotated[Optional[int], typer.Option('--img-size', min=1, help='Input size, if not the model\'s own')]
CropPct = Annotated[Optional[float], typer.Option('--crop-pct', help='Centre crop, if not the model\'s own')]
Interpolation = Annotated[Optional[str], typer.Option('--interpolation', help='Resize method: bicubic, bilinear ...')]
Amp = Annotated[bool, typer.Option('--amp', help='Mixed precision')]
AmpDtype = Annotated[str, typer.Option('--amp-dtype', help='bfloat16 or float16; "--amp bf16" says both')]
ChannelsLast = Annotated[bool, typer.Option('--channels-last', help='Use the channels-last memory format')]
Compile = Annotated[bool, typer.Option('--torchcompile', help='Compile the networks')]
Streaming = Annotated[Optional[bool], typer.Option(
    '--streaming/--no-streaming', help='Read shards as they are needed, no copy on disk')]
BenchmarkName = Annotated[Optional[str], typer.Option(
    '--benchmark', help='imagenet-1k, imagenet-real, imagenet-v2, imagenet-a or imagenet-r')]
Format = Annotated[Optional[str], typer.Option('--results-format', help='json or csv; goes by the suffix')]
Resume = Annotated[bool, typer.Option('--resume', help='Continue a run that was ended, by its --results-file')]
Retry = Annotated[bool, typer.Option('--retry', help='Halve batches that do not fit into memory')]
MaxBad = Annotated[int, typer.Option('--max-bad', min=0, help='Unreadable images to leave out before it is an error')]
Device = Annotated[Optional[str], typer.Option('--device', help='cpu, cuda, ...; an accelerator if there is one')]
Processes = Annotated[Optional[int], typer.Option(
    '--num-processes', min=1, help='Processes that have to be running, over all nodes')]
Timeout = Annotated[float, typer.Option('--timeout', min=1, help='Seconds until a silent process counts as lost')]


@app.command()
def evaluate(
        model: Annotated[str, typer.Argument(help='Folder of an SFormer, hf-hub:ID, or name of a timm model')],
        dataset: Annotated[str, typer.Option(help=Dataset)],
        split: Annotated[Optional[str], typer.Option(help='Split of the dataset')] = None,
        num_images: Annotated[Optional[int], typer.Option(min=1, help='Random subset of this size')] = None,
        batch_size: Annotated[int, typer.Option(min=1, help='Images per batch and process')] = 64,
        workers: Annotated[int, typer.Option(min=0, max=256, help='Processes that decode images')] = 0,
        seed: Annotated[int, typer.Option(help='Seed of the subset')] = 0,
        source: Annotated[bool, typer.Option(help='Evaluate the source network alongside')] = True,
        image_column: Annotated[Optional[str], typer.Option(help='Column of the images, if it is not found')] = None,
        label_column: Annotated[Optional[str], typer.Option(help='Column of the labels, if it is not found')] = None,
        results_file: Annotated[Optional[Path], typer.Option(help='JSON or CSV file for the results')] = None,
        results_format: Format = None,
        streaming: Streaming = None,
        benchmark: BenchmarkName = None,
        img_size: ImageSize = None,
        crop_pct: CropPct = None,
        interpolation: Interpolation = None,
        amp: Amp = False,
        amp_dtype: AmpDtype = 'bfloat16',
        channels_last: ChannelsLast = False,
        torchcompile: Compile = False,
        resume: Resume = False,
        retry: Retry = False,
        max_bad: MaxBad = 0,
        device: Device = None,
        num_processes: Processes = None,
        timeout: Timeout = 600.,
):
    """Evaluate an SFormer side by side with its source network; under torchrun, on many processes."""
    options = dict(
        split=split, num_images=num_images, batch_size=batch_size, workers=workers, seed=seed,
        image_column=image_column, label_column=label_column, streaming=streaming, benchmark=benchmark,
        img_size=img_size, crop_pct=crop_pct, interpolation=interpolation, amp=precision(amp, amp_dtype),
        channels_last=channels_last, torchcompile=torchcompile, retry=retry, max_bad=max_bad)
    results = evaluate_models(
        [model], dataset, options, source, results_file, results_format, resume, device, num_processes, timeout)
    for line in [line for result in results for line in summary(result)]:
        print(line)
    if results and results_file:
        print(f'results in {results_file}')


def precision(amp: bool, dtype: str) -> Optional[str]:
    """dtype of mixed precision, None without it."""
    if dtype not in AMP_DTYPES:
        raise SFormerError(f'--amp-dtype is {" or ".join(AMP_DTYPES[:3:2])}, not {dtype!r}.')
    return dtype if amp else None


def evaluate_models(
        names: List[str],
        dataset: str,
        options: Dict[str, Any],
        source: bool,
        results_file: Optional[Path],
        results_format: Optional[str],
        resume: bool,
        device: Optional[str],
        num_processes: Optional[int],
        timeout: float,
) -> List[Dict[str, Any]]:
    """Evaluate models and write their results; returns them on the main process, and nothing on the others."""
    if device is not None and device.startswith('meta'):
        raise SFormerError('--device meta has no values to evaluate with; cpu and cuda do.')
    from .evaluation import (
        EvaluationConfig,
        Journal,
        check_replaceable,
        check_results_file,
        evaluate_all,
        write_results,
    )
    from .evaluation.distributed import Group, RankError
    from .saving import open_model
    try:
        with Group(device, num_processes, timeout).guard() as group:
            if resume and not results_file:
                raise SFormerError('--resume goes by the --results-file of the run to continue: name it.')
            format = check_results_file(results_file, results_format) if results_file and group.is_main else ''
            known = dataset_by_name(dataset)
            options = dict(options, **{k: v for k, v in known.items() if options.get(k) is None and k != 'dataset'})
            options['streaming'] = bool(options['streaming'])
            config = EvaluationConfig(dataset=known['dataset'], device=group.device, timeout=timeout, **options)
            journal = Journal(f'{results_file}.progress', resume) if results_file else None
            models = [open_model(name) for name in names]
            if format == 'json' and results_file and not resume:
                check_replaceable(results_file, models, known['dataset'])
            results = evaluate_all(models, config, sources=source, group=group, journal=journal)
            results = [dict(model=name, architecture=result.pop('model'), **result, command=command_line())
                       for name, result in zip(names, results, strict=True)]
            if journal is not None and results_file:
                if group.is_main:
                    write_results(results_file, results, format)
                group.wait('written')
                if group.local_rank == 0:
                    journal.remove()
            return results if group.is_main else []
    except RankError:
        raise typer.Exit(1) from None  # the rank that failed has said so


def dataset_by_name(name: str) -> Dict[str, Any]:
    """What a well-known name of a dataset stands for, unless there is a folder of this name."""
    from .evaluation.benchmarks import DATASETS
    return DATASETS[name] if name in DATASETS and not Path(name).is_dir() else dict(dataset=name)


def summary(result: Dict[str, Any]) -> List[str]:
    """Lines that say what an evaluation found."""
    lines = [f'{result["model"]} on {result["num_images"]} images of {result["dataset"]}'
             + (f' ({result["split"]})' if result['split'] else ''),
             f'  top-1 {result["top1"]:.2f} %   top-5 {result["top5"]:.2f} %{reliability(result)}']
    if 'source_top1' in result:
        lines += [f'  source: top-1 {result["source_top1"]:.2f} %   top-5 {result["source_top5"]:.2f} %'
                  f'{reliability(result, "source_")}',
                  f'  drop {result["source_top1"] - result["top1"]:+.2f} points   '
                  f'agreement {result["agreement"]:.2f} %   '
                  f'relative logit error {result["relative_logit_error"]:.4f}']
    if result.get('activity') is not None:
        lines.append(f'  firing rate {result["activity"]:.3f}')
    for key, what in (('skipped_images', 'without a label'), ('bad_images', 'unreadable')):
        number = len(result[key]) if key == 'bad_images' else result[key]
        lines += [f'  left out: {number} images {what}'] if number else []
    lines += [f'    {name}' for name in result['bad_images']]
    loading = result['decode_seconds'] + result['preprocess_seconds']
    computing = result['seconds'] + result.get('source_seconds', 0.)
    return lines + [
        f'  {result["seconds"]:.1f} s, {result["images_per_second"]:.1f} images/s'
        + (f' on {result["world_size"]} processes' if result['world_size'] > 1 else ''),
        f'  decoding and preprocessing {100 * loading / (loading + computing):.1f} % of the work '
        f'({result["decode_seconds"]:.1f} s + {result["preprocess_seconds"]:.1f} s), '
        f'waited for {result["wait_seconds"]:.1f} s of {result["wall_seconds"]:.1f} s']


def reliability(result: Dict[str, Any], prefix: str = '') -> str:
    nll = result[f'{prefix}nll']
    return ('' if nll is None else f'   NLL {nll:.4f}') + f'   calibration error {result[f"{prefix}ece"]:.2f} %'


@app.command('list')
def list_models():
    """List the models that the package registers with timm, with their sources."""
    from rich.console import Console
    from rich.table import Column, Table

    from .entrypoints import entries
    names = (Column(name, no_wrap=True) for name in ('model', 'source'))
    table = Table(*names, 'parameters [M]', 'input', 'classes', 'licence', 'weights', 'measured top-1 [%]')
    for entry in entries():
        table.add_row(
            entry['name'], entry['source'], f'{entry["param_count"]:.1f}', 'x'.join(map(str, entry['input_size'])),
            str(entry['num_classes'] or 'features'), entry['license'], entry['weights'], entry['results'])
    console = Console()
    console.print(table) if console.is_terminal else Console(width=240).print(table)


@app.command()
def demo(
        output: Annotated[Path, typer.Option('--output', '-o', help='Folder for models and pictures')] = Path(
            'sformer-demo'),
):
    """Convert and evaluate a small vision transformer on handwritten digits; needs no network, under two minutes."""
    from .demo import run
    run(output)


@app.command()
def compare(
        models: Annotated[List[str], typer.Argument(help='Folders of SFormers, hf-hub:ID, or names of timm models')],
        dataset: Annotated[str, typer.Option(help=Dataset)],
        split: Annotated[Optional[str], typer.Option(help='Split of the dataset')] = None,
        num_images: Annotated[Optional[int], typer.Option(min=1, help='Random subset of this size')] = None,
        batch_size: Annotated[int, typer.Option(min=1, help='Images per batch and process')] = 64,
        workers: Annotated[int, typer.Option(min=0, max=256, help='Processes that decode images')] = 0,
        seed: Annotated[int, typer.Option(help='Seed of the subset')] = 0,
        source: Annotated[bool, typer.Option(help='Evaluate source networks alongside')] = True,
        image_column: Annotated[Optional[str], typer.Option(help='Column of the images, if it is not found')] = None,
        label_column: Annotated[Optional[str], typer.Option(help='Column of the labels, if it is not found')] = None,
        results_file: Annotated[Optional[Path], typer.Option(help='JSON or CSV file for the results')] = None,
        results_format: Format = None,
        streaming: Streaming = None,
        benchmark: BenchmarkName = None,
        img_size: ImageSize = None,
        crop_pct: CropPct = None,
        interpolation: Interpolation = None,
        amp: Amp = False,
        amp_dtype: AmpDtype = 'bfloat16',
        channels_last: ChannelsLast = False,
        torchcompile: Compile = False,
        resume: Resume = False,
        retry: Retry = False,
        max_bad: MaxBad = 0,
        device: Device = None,
        num_processes: Processes = None,
        timeout: Timeout = 600.,
):
    """Evaluate several models in one pass over the images, and print one table."""
    options = dict(
        split=split, num_images=num_images, batch_size=batch_size, workers=workers, seed=seed,
        image_column=image_column, label_column=label_column, streaming=streaming, benchmark=benchmark,
        img_size=img_size, crop_pct=crop_pct, interpolation=interpolation, amp=precision(amp, amp_dtype),
        channels_last=channels_last, torchcompile=torchcompile, retry=retry, max_bad=max_bad)
    results = evaluate_models(
        models, dataset, options, source, results_file, results_format, resume, device, num_processes, timeout)
    if not results:
        return
    from rich.console import Console
    from rich.table import Table
    first = results[0]
    table = Table(
        'model', 'top-1 [%]', 'top-5 [%]', 'NLL', 'ECE [%]', 'source top-1', 'agreement [%]', 'logit error',
        'firing rate', 'images/s', title=f'{first["num_images"]} images of {first["dataset"]}'
        + (f' ({first["split"]})' if first['split'] else ''))

    def cell(value: Optional[float], digits: int) -> str:
        return '' if value is None else f'{value:.{digits}f}'
    for result in results:
        table.add_row(
            result['model'], cell(result['top1'], 2), cell(result['top5'], 2), cell(result['nll'], 4),
            cell(result['ece'], 2), cell(result.get('source_top1'), 2), cell(result.get('agreement'), 2),
            cell(result.get('relative_logit_error'), 4), cell(result.get('activity'), 3),
            cell(result['images_per_second'], 1))
    console = Console()
    console.print(table) if console.is_terminal else Console(width=160).print(table)
    if results_file:
        print(f'results in {results_file}')


License = Annotated[Optional[str], typer.Option(help='License of the source weights, if the conversion has none')]
BaseModel = Annotated[Optional[str], typer.Option(help='Hub id of the source weights, if the conversion has none')]
DatasetIds = Annotated[Optional[List[str]], typer.Option(
    '--dataset-id', help='NAME=org/dataset: Hub id of a local copy that results name')]


def parse_dataset_ids(pairs: Optional[List[str]]) -> Dict[str, str]:
    """`['data/cifar10=uoft-cs/cifar10']` -> `{'data/cifar10': 'uoft-cs/cifar10'}`."""
    ids = dict(pair.rpartition('=')[::2] for pair in pairs or [])
    if not all(ids) or not all(ids.values()):
        raise SFormerError(f'--dataset-id takes NAME=org/dataset, got {", ".join(map(repr, pairs or []))}.')
    return ids


@app.command()
def publish(
        model: Annotated[Path, typer.Argument(help='Folder of an SFormer with its results files')],
        repo: Annotated[str, typer.Argument(help='Repository on the Hub: org/name')],
        private: Annotated[bool, typer.Option('--private', help='Create a private repository')] = False,
        create_pr: Annotated[bool, typer.Option('--create-pr', help='Propose a pull request')] = False,
        dry_run: Annotated[bool, typer.Option('--dry-run', help='Show files and card; needs no network')] = False,
        force: Annotated[bool, typer.Option('--force', help='Even if uncalibrated or not evaluated')] = False,
        license: License = None,
        base_model: BaseModel = None,
        dataset_id: DatasetIds = None,
):
    """Publish an SFormer with its card, results and plots on the Hugging Face Hub."""
    from .publish import prepare
    from .publish import publish as publish_model
    options: Dict[str, Any] = dict(
        force=force, license=license, base_model=base_model, dataset_ids=parse_dataset_ids(dataset_id))
    if dry_run:
        done = prepare(model, repo, **options)
    else:
        done = publish_model(model, repo, private=private, create_pr=create_pr, **options)
    for name in done.unused:
        print(f'{name} is not used: it has results of other weights', file=sys.stderr)
    if dry_run:
        print('\n'.join([f'{repo} would hold', *done.listing(), '', done.card]))
    else:
        print(f'{repo}: {"published" if done.changed else "nothing has changed"}, {done.url}')


@app.command()
def card(
        model: Annotated[Path, typer.Argument(help='Folder of an SFormer with its results files')],
        output: Annotated[Path, typer.Option('--output', '-o', help='Folder for the card')] = Path('model_cards'),
        name: Annotated[Optional[str], typer.Option(help='Name of the model; that of the folder if not given')] = None,
        repo: Annotated[Optional[str], typer.Option(help='Repository that it will be in: org/name')] = None,
        license: License = None,
        base_model: BaseModel = None,
        dataset_id: DatasetIds = None,
):
    """Write the model card of an SFormer, with plots, to OUTPUT/NAME.md."""
    from .cards import read_record, write_card
    from .publish import check_repo_id
    from .saving import load_model
    if repo:
        check_repo_id(repo)
    record, unused = read_record(
        model, load_model(model), name=name, repo_id=repo, license=license, base_model=base_model,
        dataset_ids=parse_dataset_ids(dataset_id))
    for file in unused:
        print(f'{file} is not used: it has results of other weights', file=sys.stderr)
    print(f'card in {write_card(record, output)}')
