"""`sformer demo`: a trained ViT becomes an SFormer, is evaluated, saved, reloaded, and drawn."""
import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import SFormerError

if TYPE_CHECKING:
    from torch.nn import Module

    from ..evaluation.schema import Result

__all__ = ['demo', 'run']

SHOWN_LEVELS = (4, 8, 32)
CURVE = (1, 2, 4, 8, 16, 32)
COMMAND = 'sformer demo'  # what the model of the demo records, whatever its folder
MODEL = 'sformer_nano'
ACCURACY = 'accuracy.png'
ACTIVITY = 'activity.png'


def demo(
        output: Annotated[Path, typer.Option('--output', '-o', help='Folder for models and pictures')] = Path(
            'sformer-demo'),
) -> None:
    """Convert and evaluate a small vision transformer on handwritten digits; needs no network, under two minutes."""
    run(output)


def run(output: Path) -> None:
    """Convert the digits ViT that ships with the package and show what comes out.

    Args:
        output: Folder for the SFormer (`sformer_nano/`) and the pictures; what the demo put there before is replaced.

    Raises:
        SFormerError: If there is something else by these names.
    """
    output = Path(output)
    check_own_folder(output)
    with single_thread():
        run_steps(output)


def check_own_folder(output: Path) -> None:
    """Raise SFormerError if the demo would replace what it did not write."""
    from ..files import may_write
    from ..publishing.plots import is_own_plot
    from ..saving.model_config import CONFIG_NAME, WEIGHTS_NAME, read_config

    def is_own_model(path: Path) -> bool:
        try:
            return read_config(path.parent).get('sformer', {}).get('command') == COMMAND
        except SFormerError:
            return False
    may_write(output, "picture of the demo's", is_own_plot, files=(ACCURACY, ACTIVITY))
    may_write(output / MODEL, "model of the demo's", is_own_model, files=(CONFIG_NAME, WEIGHTS_NAME))


@contextlib.contextmanager
def single_thread() -> Iterator[None]:
    """One thread for networks this small: several wait for one another, on a busy machine for minutes."""
    import torch
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def run_steps(output: Path) -> None:
    import timm
    import torch
    from rich.console import Console
    from rich.table import Table
    from timm.data import resolve_input_data_config

    from ..conversion import convert, source_of
    from ..data import open_images
    from ..evaluation import evaluate
    from ..neurons import SFNConfig
    from ..tasks import save_model
    console = Console()
    start = time.perf_counter()
    source = source_of(timm.create_model('sformer_nano.digits', pretrained=True)).eval()
    parameters = sum(p.numel() for p in source.parameters())
    console.print(f'Source: a ViT with {parameters:,} parameters, trained on 1,257 handwritten digits; '
                  f'evaluated on 540 others.')

    results: dict[int, Result] = {}
    networks: dict[int, Module] = {}
    for levels in sorted({*CURVE, *SHOWN_LEVELS}):
        begin = time.perf_counter()
        model = networks[levels] = convert(
            source, 'digits', SFNConfig(levels=levels), split='train', command=COMMAND)
        seconds = time.perf_counter() - begin
        # of the other points of the curve, only the accuracy is shown
        found = evaluate(model, 'digits', 'test') if levels in SHOWN_LEVELS else evaluate(
            model, 'digits', 'test', source=False, activity_images=0)
        results[levels] = dict(found, conversion_seconds=seconds)
    best = results[SHOWN_LEVELS[-1]]

    table = Table('network', 'top-1', 'agreement', 'activity', 'convert \\[s]', 'test \\[s]')
    table.add_row('source ViT', f'{best["source_top1"]:.2f} %', '', '', '', f'{best["source_seconds"]:.2f}')
    for levels in SHOWN_LEVELS:
        r = results[levels]
        table.add_row(f'SFormer, N = {levels}', f'{r["top1"]:.2f} %', f'{r["agreement"]:.2f} %',
                      f'{r["activity"]:.3f}', f'{r["conversion_seconds"]:.2f}', f'{r["seconds"]:.2f}')
    console.print(table)

    model = networks[SHOWN_LEVELS[-1]]
    folder = save_model(model, output / MODEL, overwrite=True)
    reloaded = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    data_config = resolve_input_data_config(model)
    images, _ = next(iter(open_images('digits', 'test', data_config=data_config).batches(64)))
    with torch.inference_mode():
        if not torch.equal(model(images), reloaded(images)):
            raise SFormerError('the reloaded SFormer gives other logits than the one that was saved.')
    console.print(f'Saved to {folder}, reloaded through timm: the same logits, bit for bit.', soft_wrap=True,
                  markup=False)

    console.print(f'{_draw(output, results)} ({time.perf_counter() - start:.0f} s in all)',
                  soft_wrap=True, markup=False)


def _draw(output: Path, results: dict[int, 'Result']) -> str:
    """Write the pictures, if what draws them is installed, and say so."""
    from ..files import write_aside
    from ..publishing.plots import need_pages, plot_accuracy, plot_activity
    try:
        need_pages()
    except SFormerError as e:
        return f'Without pictures: {e}'
    best = results[SHOWN_LEVELS[-1]]
    with write_aside(output) as aside:
        accuracy = {levels: results[levels]['top1'] for levels in CURVE}
        (aside / ACCURACY).write_bytes(plot_accuracy(accuracy, best['source_top1'], best['num_images']))
        (aside / ACTIVITY).write_bytes(plot_activity(best['activity_per_site'], SHOWN_LEVELS[-1]))
    return f'Pictures: {output / ACCURACY}, {output / ACTIVITY}'
