"""`sformer distill`."""
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, cast

import typer

from ..errors import RunInterruptedError, SFormerError
from .arguments import command_line
from .options import MAX_BATCH_SIZE, MAX_IMAGES, MAX_SEED, Dataset, unfolded

__all__ = ['distill']

SHOWN = 100  # steps of a line


@unfolded
def distill(
        model: Annotated[str, typer.Argument(help='Folder of an SFormer, hf-hub:ID, or name of one with weights')],
        output: Annotated[Path, typer.Option('--output', '-o', help='Folder for the trained SFormer')],
        dataset: Annotated[str, typer.Option(help=f'Images to train on: dead-leaves (generated), {Dataset}')],
        split: Annotated[str | None, typer.Option(help='Split of the data set')] = None,
        num_images: Annotated[int, typer.Option(min=1, max=MAX_IMAGES, help='Number of images')] = 10_000,
        steps: Annotated[int, typer.Option(min=1, max=MAX_IMAGES, help='Steps, one batch each')] = 1000,
        batch_size: Annotated[int, typer.Option(min=1, max=MAX_BATCH_SIZE, help='Images per step')] = 64,
        learning_rate: Annotated[float, typer.Option(min=0, help='Highest learning rate of AdamW')] = 1e-4,
        price: Annotated[float, typer.Option(
            min=0, help='What a unary spike per neuron costs, in squared relative errors of the logits')] = 0.01,
        amp: Annotated[bool, typer.Option('--amp', help='Mixed precision: the SFormer in bfloat16')] = False,
        source_model: Annotated[str | None, typer.Option(
            help='Teacher: this model, or the source inside of this SFormer, where its weights have moved')] = None,
        seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help='Seed of the choice and the order of images')] = 0,
        resume: Annotated[bool, typer.Option(
            '--resume', help='Continue a training that was ended, by what it left in the folder')] = False,
        overwrite: Annotated[bool, typer.Option(
            '--overwrite', help='Replace a model, or the state of a training, that is there')] = False,
) -> None:
    """Train an SFormer to follow its source with fewer spikes. This is training, but reads no labels."""
    from ..conversion import Conversion, another_source, calibration_batches, network_inside
    from ..conversion.distillation import DistillConfig, distill_, shuffled
    from ..conversion.training_state import STATE_NAME, TrainingState
    from ..data import ImageRequest
    from ..models import SFormerMixin
    from ..saving import check_vacant
    from ..tasks import open_model, save_model
    check_vacant(output, overwrite)
    state = TrainingState(output / STATE_NAME)
    if state.path.exists() and not (resume or overwrite):
        raise SFormerError(f'{output} has the state of a training that was ended: --resume continues it, --overwrite '
                           f'starts over.')
    network = cast(SFormerMixin, open_model(model, 'distill'))
    teacher = another_source(network, open_model(source_model, 'distill')) if source_model else network_inside(network)
    wanted = ImageRequest(dataset=dataset, split=split, num_images=num_images, seed=seed)
    batches, used, _ = calibration_batches(network, wanted, batch_size, 'Reading')

    def report(step: int, error: float, spikes: float) -> None:
        if step % SHOWN == 0 or step == steps:
            print(f'step {step}: {said(state.history[(step - 1) // SHOWN * SHOWN:])}', flush=True)

    if not resume:
        state.remove()
    try:
        distill_(network, shuffled(batches, batch_size, seed), steps, DistillConfig(learning_rate, price, amp=amp),
                 report, teacher, state)
        how = (f'{steps} steps of {batch_size} of {num_images} images of {used["name"]} ({used["split"]}), '
               f'{state.seconds:.0f} s: {command_line()}')
        network.conversion = dataclasses.replace(cast(Conversion, network.conversion), distillation=how)
        save_model(network, output, overwrite)
    except KeyboardInterrupt:
        if state.path.exists():
            raise RunInterruptedError('interrupted. The same command with --resume continues.') from None
        raise
    state.remove()
    print(f'trained for {state.seconds:.0f} s, from {said(state.history[:1])}; saved to {output}')


def said(history: Sequence[Sequence[float]]) -> str:
    """What was measured in some steps, on average."""
    error, spikes = (sum(values) / len(history) for values in zip(*history, strict=True))
    return f'relative error {error ** 0.5:.4f}, {spikes:.3f} unary spikes per neuron'
