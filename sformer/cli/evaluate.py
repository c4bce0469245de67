"""`sformer evaluate`, and the evaluation that `sformer compare` shares with it."""
import logging
import os
from pathlib import Path
from typing import Annotated, Any, Dict, List, Optional

import typer

from ..errors import RankError, RunInterruptedError, SFormerError
from .arguments import command_line
from .detect import detection_summary, run_detections
from .options import EvaluationOptions, unfolded

__all__ = ['evaluate', 'run_evaluation']

_logger = logging.getLogger(__name__)


@unfolded
def evaluate(
        model: Annotated[str, typer.Argument(
            help='Folder of an SFormer, hf-hub:ID, an exported .onnx, or name of a timm model')],
        options: EvaluationOptions,
) -> None:
    """Evaluate an SFormer side by side with its source network; under torchrun, on many processes."""
    results = run_evaluation([model], options)
    for line in [line for result in results for line in (detection_summary if 'boxes' in result else summary)(result)]:
        print(line)
    if results and options.results_file:
        print(f'results in {options.results_file}')


def run_evaluation(names: List[str], options: EvaluationOptions) -> List[Dict[str, Any]]:
    """Evaluate models and write their results; returns them on the main process, and nothing on the others.

    The command line calls `sformer.evaluation` here and nowhere else.

    Raises:
        SFormerError: If a model or the data set cannot be used.
        RunInterruptedError: If Ctrl-C ended it and finished chunks are on disk.
    """
    from ..evaluation import (
        EvaluationConfig,
        Journal,
        check_replaceable,
        check_results_file,
        evaluate_all,
        write_results,
    )
    from ..evaluation.labels import DATASETS
    from ..evaluation.launch import Group
    file = options.results_file
    journals: List[Journal] = []

    def new_journal() -> Optional[Journal]:
        journals.extend([Journal(f'{file}.progress', options.resume)] if file else [])
        return journals[-1] if journals else None

    try:
        with Group(options.device, options.timeout).guard() as group:
            check_launcher(options.num_processes, group.world_size)
            if options.resume and not file:
                raise SFormerError('--resume goes by the --results-file of the run to continue: name it.')
            format = check_results_file(file, options.results_format) if file and group.is_main else ''
            if detectors(names):
                results = run_detections(names, options, group, new_journal)
            else:
                config = EvaluationConfig(**settings(options, DATASETS), device=group.device)
                check_engine(names, options)
                models = [open_network(name, options.engine) for name in names]
                if file and format == 'json' and not options.resume:
                    check_replaceable(file, models, config.dataset)
                sources = sources_of(models, names, options)
                results = evaluate_all(models, config, sources=sources, group=group, journal=new_journal())
            if options.source_model:
                results = [dict(result, source_model=options.source_model) for result in results]
            results = [
                dict(model=name, architecture=result.pop('model'), **result, command=command_line())
                for name, result in zip(names, results, strict=True)]
            if file:
                if group.is_main:
                    write_results(file, results, format)
                group.gather('written')
                for journal in journals if group.local_rank == 0 else ():
                    journal.remove()
            return results if group.is_main else []
    except RankError:
        raise typer.Exit(1) from None  # the rank that failed has said so
    except KeyboardInterrupt:
        if any(True for journal in journals for _ in journal.path.glob('*.jsonl')):
            raise RunInterruptedError('interrupted. The same command with --resume continues.') from None
        raise


def check_launcher(asked: Optional[int], running: int) -> None:
    """Say so if this is one of several processes that do not know of one another.

    Args:
        asked: How many processes there have to be; not checked if None.
        running: How many there are.

    Raises:
        SFormerError: If there are more or fewer; if `accelerate launch --cpu --num_processes N` started one process for
            N; if it was mpirun.
    """
    torchrun = f'torchrun --nproc-per-node {asked or "N"} -m sformer ...'
    if 'WORLD_SIZE' not in os.environ:
        if 'ACCELERATE_MIXED_PRECISION' in os.environ and 'MASTER_PORT' in os.environ:
            # accelerate's launcher for one process sets the rendezvous for several, and then starts one
            raise SFormerError('accelerate launch was asked for several processes and started only this one, as it '
                               f'does on CPUs: use {torchrun} instead.')
        if any(is_several(name) for name in ('OMPI_COMM_WORLD_SIZE', 'PMI_SIZE', 'MV2_COMM_WORLD_SIZE')):
            raise SFormerError(f'mpirun starts processes that do not know where to meet: use {torchrun} instead.')
        # a script of sbatch has the variable, too, so it may be that nothing is wrong
        if is_several('SLURM_NTASKS') and os.environ.get('SLURM_PROCID', '0') == '0':
            tasks = os.environ['SLURM_NTASKS']
            _logger.warning(
                f'SLURM_NTASKS is {tasks}, but nothing says that processes belong together (RANK, WORLD_SIZE): if srun '
                f'started this one {tasks} times, all do the same work. Have srun start torchrun, once per node.')
    if asked not in (None, running):
        raise SFormerError(f'{asked} processes were asked for, but {running} {"is" if running == 1 else "are"} '
                           f'running: start them with {torchrun}')


def is_several(name: str) -> bool:
    """Whether a variable of the environment is a number above one."""
    value = os.environ.get(name, '')
    return value.isdigit() and int(value) > 1


def sources_of(models: List[Any], names: List[str], options: EvaluationOptions) -> List[Any]:
    """What each model is compared with, as `evaluate_all` takes it.

    Raises:
        SFormerError: If the one that was asked for cannot be loaded, or does not go with a model.
    """
    from ..conversion import another_source, warn_of_changes
    from ..saving import open_model
    if options.source_model:
        source = open_model(options.source_model)
        return [another_source(model, source) for model in models]
    for name, model in zip(names, models, strict=True):
        if options.source:
            warn_of_changes(name, model)
    return [options.source] * len(models)


def detectors(names: List[str]) -> bool:
    """Whether what is evaluated are detectors.

    Raises:
        SFormerError: If only some are, which no figure compares; or a config on the Hub cannot be had.
    """
    from ..detection import is_detector
    found = {name: is_detector(name) for name in names}
    if {*found.values()} == {True, False}:
        one, other = (next(name for name in names if found[name] == kind) for kind in (True, False))
        raise SFormerError(f'{one} is a detector, {other} is not: nothing compares them.')
    return all(found.values())


def check_engine(names: List[str], options: EvaluationOptions) -> None:
    """Raise SFormerError for options that would be recorded and change nothing."""
    exported = [name for name in names if name.endswith('.onnx')]
    if options.engine and not exported:
        raise SFormerError('--engine is for models that `sformer export` wrote, which end in .onnx.')
    for option in ('amp', 'torchcompile', 'channels_last'):
        if exported and getattr(options, option):
            raise SFormerError(f'{exported[0]} computes as it was exported: leave out --{option.replace("_", "-")}.')


def open_network(name: str, engine: Optional[str]) -> Any:
    """A model by its name, or a graph that was exported of one.

    Raises:
        SFormerError: If there is none, or its weights or its engine cannot be used.
    """
    from ..execution import load_onnx
    from ..saving import open_model
    return load_onnx(name, engine) if name.endswith('.onnx') else open_model(name)


def settings(options: EvaluationOptions, datasets: Dict[str, Dict[str, Any]]) -> Dict[str, Any]:
    """Fields of an evaluation's config, with what a well-known name of a data set stands for.

    Args:
        options: What the user wants.
        datasets: What names stand for, unless there is a folder of this name.
    """
    same = ('split', 'num_images', 'batch_size', 'workers', 'seed', 'image_column', 'label_column', 'streaming',
            'benchmark', 'by_position', 'img_size', 'crop_pct', 'interpolation', 'channels_last', 'torchcompile',
            'retry', 'max_bad', 'timeout')
    config = dict({name: getattr(options, name) for name in same}, amp=options.amp_dtype if options.amp else None)
    known = {} if Path(options.dataset).is_dir() else datasets.get(options.dataset, {})
    config.update({name: value for name, value in known.items() if config.get(name) is None})
    return dict(config, dataset=known.get('dataset', options.dataset), streaming=bool(config['streaming']))


def summary(result: Dict[str, Any]) -> List[str]:
    """Lines that say what an evaluation found."""
    from ..evaluation.figures import CLASSIFICATION
    from ..evaluation.schema import SOURCE
    lines = [f'{result["model"]} on {result["num_images"]} images of {result["dataset"]}'
             + (f' ({result["split"]})' if result['split'] else ''),
             f'  {CLASSIFICATION.said(result)}']
    if 'source_top1' in result:
        lines += [f'  source: {CLASSIFICATION.said(result, SOURCE)}',
                  f'  drop {result["source_top1"] - result["top1"]:+.2f} points   {CLASSIFICATION.compared(result)}']
    if result.get('activity') is not None:
        spikes = ', '.join(f'{n:.3f} {coding}' for coding, n in (result.get('spikes_per_neuron') or {}).items())
        lines.append(f'  activity {result["activity"]:.3f}' + (f'   spikes per neuron {spikes}' if spikes else ''))
    for key, what in (('skipped_images', 'without a label'), ('bad_images', 'unreadable')):
        number = len(result[key]) if key == 'bad_images' else result[key]
        lines += [f'  left out: {number} images {what}'] if number else []
    lines += [f'    {name}' for name in result['bad_images']]
    if result['num_passed_over']:
        names = ', '.join(result['passed_over'][:3]) + (' ...' if result['num_passed_over'] > 3 else '')
        lines.append(
            f'  passed over: {result["num_passed_over"]} files or folders that are no labelled images ({names})')
    loading = result['decode_seconds'] + result['preprocess_seconds']
    computing = result['seconds'] + result.get('source_seconds', 0.)
    return lines + [
        f'  {result["seconds"]:.1f} s, {result["images_per_second"]:.1f} images/s'
        + (f' on {result["world_size"]} processes' if result['world_size'] > 1 else ''),
        f'  decoding and preprocessing {100 * loading / (loading + computing):.1f} % of the work '
        f'({result["decode_seconds"]:.1f} s + {result["preprocess_seconds"]:.1f} s), '
        f'waited for {result["wait_seconds"]:.1f} s of {result["wall_seconds"]:.1f} s']
