"""Which changes of the package no test notices: mutants of its modules, each run against the tests of its module.

    python scripts/mutants.py --number 100 --out mutants.json
    python scripts/mutants.py --number 20 --only neurons/functional
    python scripts/mutants.py --again 3f2a90c1b7

A mutant is the package with one expression or statement changed: a comparison, a term, a constant, a `min` for a
`max`, a return at the start of a function. They are drawn by a seed, in turn from each folder, there from each module
and from each kind of change. Everything happens in a copy of the tree. What is slow to import is imported once; each
mutant is a fork of that process, so it costs its tests. A run that was stopped goes on with the same command. What
survives is a gap in the tests, or means the same as the original: somebody has to look.
"""
import compileall
import contextlib
import dataclasses
import importlib
import itertools
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from mutations import Mutant, differs, drawn, mutants_of

ROOT = Path(__file__).parents[1]
FOLDERS = ('neurons', 'layers', 'conversion', 'execution', 'evaluation', 'detection', 'publishing', 'saving')
POLL = 0.02  # seconds
PRELOADED = ('torch', 'timm', 'datasets', 'pytest', 'hypothesis', 'sklearn.datasets', 'torchvision', 'pycocotools.mask')

# module -> files of tests, where it has none of its own name; the first ones are the likeliest to notice
TESTS = {
    'baselines/comparison': ['cli/test_baselines'],
    'baselines/rows': ['cli/test_baselines'],
    'conversion/places': ['conversion/test_checkpoints', 'cli/test_checkpoints'],
    'conversion/preprocessors': ['conversion/test_families', 'conversion/test_checkpoints'],
    'conversion/renaming': ['conversion/test_families'],
    'conversion/repositories': ['saving/test_hub', 'cli/test_checkpoints'],
    'execution/table_products': ['models/test_zoo'],
    'detection/exported_detector': ['detection/test_detector_export'],
    'conversion/importance': ['conversion/test_reconstruction'],
    'conversion/transforms': ['conversion/test_concentration', 'conversion/test_balance'],
    'conversion/training_state': ['conversion/test_distillation', 'detection/test_training'],
    'conversion/weights': ['conversion/test_checkpoints', 'conversion/test_sources'],
    'data/image_files': ['cli/test_predict', 'data/test_image_folders'],
    'detection/detector_predictions': ['cli/test_predict'],
    'execution/executions': ['execution/test_timing'],
    'execution/prepared': ['execution/test_engines', 'cli/test_export'],
    'execution/spike_outputs': ['publishing/test_page'],
    'execution/tensors': ['test_scripts_read_export', 'cli/test_export'],
    'layers/embedding': ['neurons/test_graded', 'models/test_zoo'],
    'layers/heads': ['conversion/test_balance'],
    'layers/hierarchical': ['models/test_zoo'],
    'layers/meeting': ['layers/test_attention', 'models/test_zoo'],
    'layers/stream': ['conversion/test_concentration'],
    'publishing/prediction_files': ['cli/test_predict'],
    'publishing/prediction_plots': ['cli/test_predict'],
    'publishing/web_runtime': ['publishing/test_page'],
    'baselines/counting': ['baselines/test_counting', 'baselines/test_stepped'],
    'data/batches': ['data/test_delivery', 'data/test_planned', 'data/test_request'],
    'detection/detector_entrypoints': ['detection/test_detector_folders', 'cli/test_detect'],
    'detection/drawing': ['detection/test_detector_evaluation', 'publishing/test_detector_cards'],
    'detection/masks': ['detection/test_annotations', 'detection/test_coco', 'detection/test_detector_evaluation'],
    'detection/pictures': ['publishing/test_detector_cards', 'cli/test_detect'],
    'evaluation/figures': [
        'evaluation/test_metrics', 'evaluation/test_schema', 'evaluation/test_summary', 'evaluation/test_evaluate',
        'evaluation/test_activity', 'detection/test_detector_evaluation'],
    'conversion/unreached': ['models/test_sformer', 'models/test_zoo'],
    'evaluation/predictions': ['cli/test_predict', 'publishing/test_page'],
    'execution/fired': ['execution/test_engines', 'execution/test_early', 'execution/test_saturation'],
    'execution/exported': ['execution/test_engines', 'cli/test_export', 'execution/test_saturation'],
    'execution/graph': ['execution/test_engines', 'execution/test_saturation', 'models/test_sformer'],
    'execution/onnx': ['execution/test_engines', 'cli/test_export', 'models/test_sformer'],
    'execution/operators': ['execution/test_engines', 'execution/test_saturation', 'models/test_sformer'],
    'execution/processor': ['execution/test_saturation', 'execution/test_engines'],
    'execution/proof': ['execution/test_saturation', 'execution/test_engines'],
    'execution/quantisers': ['execution/test_engines', 'execution/test_saturation'],
    'execution/rounding': ['execution/test_integer', 'execution/test_engines'],
    'execution/timing': ['execution/test_engines'],
    'layers/watch': ['profiling/test_operations'],
    'neurons/levels': ['neurons/test_functional', 'neurons/test_scale_and_fire'],
    'neurons/registry': ['neurons/test_own_neuron', 'neurons/test_config'],
    'neurons/functional': ['neurons/test_scale_and_fire', 'neurons/test_shared'],
    'profiling/constants': ['profiling/test_energy'],
    'profiling/floating': ['profiling/test_operations', 'profiling/test_counts'],
    'publishing/profile_plots': ['publishing/test_profile_page', 'publishing/test_plots'],
}


# What a mutant is run against

def tests_of(module: str, tree: Path) -> list[str]:
    """Files of tests that belong to a module, relative to the tree."""
    folder, name = module.split('/')
    own = sorted(path.relative_to(tree) for path in (tree / 'tests' / folder).glob(f'test_{name}*.py'))
    named = [Path('tests', f'{file}.py') for file in TESTS.get(module, [])]
    return [str(path) for path in dict.fromkeys([*own, *named]) if (tree / path).exists()]


class FirstFailure:
    """A plugin of pytest that writes what failed first."""

    def __init__(self, file: Path):
        self.file = file

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and not self.file.exists():
            self.file.write_text(report.nodeid, encoding='utf-8')

    def pytest_collectreport(self, report: Any) -> None:
        self.pytest_runtest_logreport(report)


def run_tests(tree: Path, tests: list[str], scratch: Path, limit: float) -> dict[str, Any]:
    """Run tests on a tree in a fork of this process.

    Args:
        tree: The tree, whose `sformer` this process has not imported.
        tests: What pytest is given: files of tests, relative to the tree.
        scratch: Folder for what pytest writes.
        limit: Time [s], after which the fork and what it has started are killed.

    Returns:
        `outcome`: `passed`, `failed`, `too long` or `broken` (the tests do not run), `seconds`, and `noticed_by`.
    """
    first, base = scratch / 'first', scratch / 'base'
    first.unlink(missing_ok=True)
    shutil.rmtree(base, ignore_errors=True)
    start = time.perf_counter()
    child = os.fork()
    if child == 0:
        os.setsid()
        code = 3
        try:
            with (scratch / 'log').open('w') as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            os.chdir(tree)
            sys.dont_write_bytecode = True  # of a file that is changed twice in a second it would be the wrong one
            import pytest
            code = int(pytest.main(
                ['-x', '-q', '-n', '0', '-p', 'no:cacheprovider', f'--basetemp={base}', *tests],
                plugins=[FirstFailure(first)]))
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
            os._exit(code)
    code, waited = None, 0.
    while code is None and waited < limit:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
        else:
            time.sleep(POLL)
            waited += POLL  # not by the clock, which goes on where a machine is stopped
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # and what its tests have left
    if code is None:
        os.waitpid(child, 0)
    outcome = 'too long' if code is None else {0: 'passed', 5: 'broken'}.get(code, 'failed')
    return dict(outcome=outcome, seconds=round(time.perf_counter() - start, 2),
                noticed_by=first.read_text(encoding='utf-8') if first.exists() else None)


@contextlib.contextmanager
def copied(tree: Path) -> Iterator[tuple[Path, Path]]:
    """A copy of a tree, which this process takes its modules from, and an empty folder."""
    with tempfile.TemporaryDirectory(prefix='mutants') as folder:
        copy, scratch = Path(folder, 'tree'), Path(folder, 'scratch')
        shutil.copytree(tree, copy, ignore=shutil.ignore_patterns('.git', '__pycache__', '.*_cache'))
        scratch.mkdir()
        compileall.compile_dir(copy, quiet=2)  # once, not in each fork
        sys.path[:0] = [str(copy), str(copy / 'tests')]
        os.environ['PYTHONPATH'] = os.pathsep.join([str(copy), str(copy / 'tests')])  # of processes that tests start
        yield copy, scratch


def preload() -> None:
    for name in PRELOADED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    loaded = [name for name in sys.modules if name.split('.')[0] == 'sformer']
    assert not loaded, f'{loaded[0]} was imported with others, and would hide its mutants'


def judge(mutant: Mutant, tree: Path, scratch: Path, limit: float, passing: set[str]) -> dict[str, Any]:
    """Run a mutant. What fails is run without the change, too, unless it is among the tests that are known to pass,
    which are added to."""
    tests = tests_of(mutant.module, tree)
    if not tests:
        raise SystemExit(f'no test belongs to {mutant.module}: name some in TESTS.')
    path = tree / 'sformer' / f'{mutant.module}.py'
    original = path.read_bytes()
    for stale in (path.parent / '__pycache__').glob(f'{path.stem}.*'):
        stale.unlink()
    path.write_bytes(mutant.of(original.decode()).encode())
    try:
        found = run_tests(tree, tests, scratch, limit)
    finally:
        path.write_bytes(original)
    failed = found['noticed_by']
    if failed is not None and failed not in passing:
        how = [] if '::' in failed else ['--collect-only']
        if run_tests(tree, [failed, *how], scratch, limit)['outcome'] != 'passed':
            return dict(dataclasses.asdict(mutant), tests=tests, **dict(found, outcome='broken'))
        passing.add(failed)
    return dict(dataclasses.asdict(mutant), tests=tests, **found)


def main(
        number: Annotated[int, typer.Option(help='Mutants')] = 100,
        seed: Annotated[int, typer.Option(help='Seed of the draw')] = 0,
        only: Annotated[Optional[list[str]], typer.Option(help='Modules, as neurons/functional, or folders')] = None,
        again: Annotated[Optional[list[str]], typer.Option(help='Mutants by their ids, run once more')] = None,
        out: Annotated[Path, typer.Option(help='Results; what stands there is not run again')] = Path('mutants.json'),
        limit: Annotated[float, typer.Option(help='Time that the tests of a mutant may take [s]')] = 300.,
        minutes: Annotated[float, typer.Option(help='Time after which no other mutant is begun')] = 600.,
        tree: Annotated[Path, typer.Option(help='Tree with sformer/ and tests/')] = ROOT,
) -> None:
    """Make mutants, run their tests, and write which of them survived."""
    end = time.monotonic() + 60 * minutes
    results: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    out = out.resolve()
    names = {path.relative_to(tree / 'sformer').with_suffix('').as_posix(): path.read_text(encoding='utf-8')
             for path in sorted((tree / 'sformer').glob('*/*.py')) if path.stem != '__init__'}
    wanted = only or FOLDERS
    mutants = [mutant for name, source in names.items() if name in wanted or name.split('/')[0] in wanted
               for mutant in mutants_of(name, source)]
    if again:
        chosen = [mutant for mutant in mutants if mutant.id in again]
        results = {id: result for id, result in results.items() if id not in again}
    else:
        usable = (mutant for mutant in drawn(mutants, seed) if differs(mutant, names[mutant.module]))
        chosen = [*itertools.islice(usable, number)]
    print(f'{len(chosen)} of {len(mutants)} mutants of {len({m.module for m in mutants})} modules')
    passing: set[str] = set()
    with copied(tree.resolve()) as (copy, scratch):
        preload()
        for mutant in chosen:
            if mutant.id in results or time.monotonic() > end:
                continue
            result = results[mutant.id] = judge(mutant, copy, scratch, limit, passing)
            aside = out.with_name(f'.{out.name}')  # not by sformer.files, which would be here for each fork
            aside.write_text(json.dumps(results, indent=2) + '\n', encoding='utf-8')
            aside.replace(out)
            print(f'{mutant.id} {mutant.module}:{mutant.line} {mutant.kind}: {result["outcome"]} '
                  f'({result["seconds"]} s)', flush=True)
    run = [results[mutant.id] for mutant in chosen if mutant.id in results]
    survivors = [result for result in run if result['outcome'] == 'passed']
    print(f'{len(run)} run, {len(survivors)} survived:')
    for r in survivors:
        print(f'  {r["module"]}:{r["line"]} {r["kind"]}: {r["before"]!r} -> {r["after"]!r}')


if __name__ == '__main__':
    typer.run(main)
