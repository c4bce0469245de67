"""`sformer evaluate`, and the evaluation that `sformer compare` shares with it."""
import logging
import os
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import RankError, RunInterruptedError, SFormerError
from .arguments import command_line
from .options import EvaluationOptions, Given, unfolded

if TYPE_CHECKING:
    from ..evaluation.schema import Result
    from ..tasks import Task

__all__ = ['evaluate', 'run_evaluation']

_logger = logging.getLogger(__name__)


@unfolded
def evaluate(
        model: Annotated[str, typer.Argument(
            help='Folder of an SFormer, hf-hub:ID, an exported .onnx, or name of a timm model')],
        options: EvaluationOptions,
        given: Given,
) -> None:
    """Evaluate an SFormer side by side with its source network; under torchrun, on many processes."""
    task, results = run_evaluation([model], options, given)
    for result in results:
        print('\n'.join(task.summary(result)))
    if results and options.results_file:
        print(f'results in {options.results_file}')


def run_evaluation(
        names: list[str],
        options: EvaluationOptions,
        given: Given,
) -> tuple['Task', list['Result']]:
    """Evaluate models and write their results; returns their task, and results on the main process alone.

    The command line calls `sformer.evaluation` here and nowhere else.

    Raises:
        SFormerError: If a model or the data set cannot be used, or models are of several tasks.
        RunInterruptedError: If Ctrl-C ended it and finished chunks are on disk.
    """
    from ..data import ImageRequest
    from ..evaluation import Journal, check_results_file, write_results
    from ..evaluation.launch import Group
    from ..tasks import OPTIONS, EvaluationRequest, one_task
    file = options.results_file
    journals: list[Journal] = []

    def new_journal() -> Journal | None:
        journals.extend([Journal(f'{file}.progress', options.resume)] if file else [])
        return journals[-1] if journals else None

    try:
        with Group(options.device, options.timeout).guard() as group:
            check_launcher(options.num_processes, group.world_size)
            if options.resume and not file:
                raise SFormerError('--resume goes by the --results-file of the run to continue: name it.')
            format = check_results_file(file, options.results_format) if file and group.is_main else ''
            task = one_task(names)
            task.check_options('evaluate', names[0], given)
            results = task.evaluate(names, EvaluationRequest(
                images=ImageRequest(
                    dataset=options.dataset, split=options.split, num_images=options.num_images, seed=options.seed),
                group=group, source=options.source, source_model=options.source_model,
                by_position=options.by_position, max_bad=options.max_bad, results_file=file, results_format=format,
                resume=options.resume, new_journal=new_journal,
                options={name: getattr(options, name) for name in OPTIONS['evaluate']}))
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
            return task, results if group.is_main else []
    except RankError:
        raise typer.Exit(1) from None  # the rank that failed has said so
    except KeyboardInterrupt:
        if any(True for journal in journals for _ in journal.path.glob('*.jsonl')):
            raise RunInterruptedError('interrupted. The same command with --resume continues.') from None
        raise


def check_launcher(asked: int | None, running: int) -> None:
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
