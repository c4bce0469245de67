"""How far the tokens of an SFormer are from those of its source, for a network that was trained at scale.

    python scripts/fidelity.py vit_small_saliency.safetensors 127 32 8 4 --images DIR -o fidelity.json
    python scripts/fidelity.py vit_small_saliency.safetensors 32 --images DIR --calibration dead-leaves --sites
    python scripts/fidelity.py vit_small_saliency.safetensors --images DIR --recipe fast --integer --engines --nncf

`scripts/saliency_source.py` builds the source. Thresholds are fitted to some of the images, errors are measured on
others: |source - sformer| / |source| over the final tokens, and over what every block gives. `--sites` says what each
kind of site makes alone, with all others left floating; `--integer` what int8 weights add, `--engines` the same run by
them; `--plain-int8` and `--nncf` are the source as ONNX Runtime and NNCF quantise it, by the same images.
"""
import ast
import copy
import dataclasses
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Optional

import torch
import torch.nn as nn
import typer
from saliency_source import MODEL, load_source, relative_error
from timm.data import resolve_input_data_config

import sformer
from sformer.conversion.record import library_versions
from sformer.data import ImageData, open_images
from sformer.evaluation.activity import Activity
from sformer.execution.engines import ENGINES, compile_graph
from sformer.execution.graph import to_graph_
from sformer.execution.onnx import to_onnx
from sformer.execution.processor import instruction_set
from sformer.execution.quantisers import nncf_graph, plain_int8
from sformer.files import file_hash, state_hash, write_json
from sformer.layers import named_neurons, shared_copy
from sformer.layers.multiplying import LINEAR
from sformer.neurons import CODINGS, SFNConfig, recipe_configs
from sformer.profiling import profile_operations
from sformer.profiling.operations import FEEDBACK

BATCH_SIZE = 16
PROFILED_IMAGES = 2
SITES_IMAGES = 16  # a dozen kinds of sites, each a network of its own


def split_images(
        network: nn.Module,
        name: str,
        split: Optional[str],
        num_test: int,
        num_images: int,
        seed: int,
) -> tuple[torch.Tensor, torch.Tensor, ImageData]:
    """Images to test with, others to calibrate with, and what both were drawn from. The former do not depend on what
    the latter are used for."""
    images = open_images(name, split, data_config=resolve_input_data_config(network),
                         num_images=num_test + num_images, seed=seed)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))  # the data may be sorted
    pixels = torch.cat([batch for batch, _ in images.batches(BATCH_SIZE)])[order]
    return pixels[:num_test], pixels[num_test:], images


@torch.inference_mode()
def outputs(network: Any, images: torch.Tensor) -> list[torch.Tensor]:
    """What all blocks give, and the final tokens, (B, L, C) each."""
    parts = []
    for batch in images.split(BATCH_SIZE):
        final, blocks = network.forward_intermediates(batch, output_fmt='NLC', return_prefix_tokens=True)
        parts.append([*(torch.cat([prefix, patches], 1) for patches, prefix in blocks), final])
    return [torch.cat(part) for part in zip(*parts, strict=True)]


def kind_of(name: str) -> str:
    """`blocks.3.mlp.fc2.neuron` -> `blocks.mlp.fc2.neuron`."""
    return '.'.join(part for part in name.split('.') if not part.isdigit())


def only(model: nn.Module, kind: str) -> nn.Module:
    """A view of a model in which sites of one kind spike and currents pass all others."""
    view = shared_copy(model).eval()
    for name, _ in list(named_neurons(view)):
        if kind_of(name) != kind:
            view.set_submodule(name, nn.Identity())
    return view


def key_values(pairs: Optional[list[str]]) -> dict[str, Any]:
    """`['levels=8', 'estimator=max']` -> `{'levels': 8, 'estimator': 'max'}`."""
    values = {}
    for pair in pairs or []:
        key, _, value = pair.partition('=')
        try:
            values[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            values[key] = value
    return values


def measure(
        model: nn.Module,
        images: torch.Tensor,
        expected: list[torch.Tensor],
        sites: bool,
        calibration: Optional[list[torch.Tensor]],
) -> dict[str, Any]:
    """Errors of one SFormer, printed as they come."""
    counts = Activity()
    with counts.observe(model):
        actual = outputs(model, images)
    spikes = counts.spikes_per_neuron() or {}
    errors = [relative_error(a, b) for a, b in zip(expected, actual, strict=True)]
    num_prefix = model.num_prefix_tokens
    patches = relative_error(expected[-1][:, num_prefix:], actual[-1][:, num_prefix:])
    print(f'N = {model.sfn_config.levels}: tokens {errors[-1]:.4f}, patch tokens {patches:.4f}, '
          f'activity {spikes["graded"]:.3f}, unary spikes {spikes["unary"]:.2f}, '
          f'blocks {" ".join(f"{e:.3f}" for e in errors[:-1])}', flush=True)
    result: dict[str, Any] = dict(
        tokens=errors[-1], patch_tokens=patches, blocks=errors[:-1], spikes_per_neuron=spikes)
    if model.sfn_config.lateral:
        result['feedback'] = feedback_share(model, images[:PROFILED_IMAGES])
    if sites:
        result['sites'], few = {}, images[:SITES_IMAGES]
        for kind in sorted({kind_of(name) for name, _ in named_neurons(model)}):
            error = relative_error(expected[-1][:SITES_IMAGES], outputs(only(model, kind), few)[-1])
            print(f'  only {kind:40} {error:.4f}', flush=True)
            result['sites'][kind] = error
    if calibration is not None:
        result['integer'] = measure_integer(model, images, expected, calibration)
    return result


def measure_integer(
        model: nn.Module,
        images: torch.Tensor,
        expected: list[torch.Tensor],
        calibration: list[torch.Tensor],
) -> dict[str, Any]:
    """The same with int8 weights, to the nearest and such that errors cancel on calibration images, and which layers
    stay in floating point."""
    nearest = copy.deepcopy(model)
    sformer.to_integer_(nearest)
    reports = sformer.to_integer_(model, batches=calibration)
    plain, error = (relative_error(expected[-1], outputs(network, images)[-1]) for network in (nearest, model))
    columns = sum(report.columns for report in reports) / len(reports)
    floating = [report.name for report in reports if not report.integer]
    print(f'  int8 weights: tokens {error:.4f} ({plain:.4f} if rounded to the nearest), {columns - 1:.1%} more '
          f'columns, in floating point: {", ".join(floating) or "none"}', flush=True)
    return dict(tokens=error, tokens_nearest=plain, columns=columns, floating=floating,
                weight_errors={report.name: report.error for report in reports})


def feedback_share(model: nn.Module, images: torch.Tensor) -> dict[str, float]:
    """What neurons feed back to one another, as a share of the linear layers: synaptic operations that lateral spikes
    cause, by coding, and weights, which is the share of operations if each is met (dense)."""
    operations, _, _ = profile_operations(model, [images])
    feedback = [o for o in operations if o.kind == FEEDBACK]
    linear = [o for o in operations if o.kind == LINEAR]
    share = {coding: sum(o.synaptic_operations[coding] for o in feedback)
             / sum(o.synaptic_operations[coding] for o in linear) for coding in CODINGS}
    share['dense'] = sum(o.weights for o in feedback) / sum(o.weights for o in linear)
    print(f'  feedback, as a share of the linear layers: {share["dense"]:.1%} of weights; of synaptic operations '
          f'{", ".join(f"{share[coding]:.1%} {coding}" for coding in CODINGS)}', flush=True)
    return share


class Tokens(nn.Module):
    """All final tokens of a network."""

    def __init__(self, network: Any, images: torch.Tensor):
        super().__init__()
        self.network = network
        self.pretrained_cfg = dict(network.pretrained_cfg, input_size=tuple(images.shape[1:]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.network.forward_features(x)


def measure_graph(what: str, graph: Any, engines: Iterable[str], images: torch.Tensor,
                  tokens: torch.Tensor) -> dict[str, float]:
    """Errors of a graph, run by each engine."""
    errors = {}
    for engine in engines:
        run = compile_graph(graph, engine)
        found = torch.cat([torch.from_numpy(run(batch.numpy())) for batch in images.split(BATCH_SIZE)])
        errors[engine] = relative_error(tokens, found)
        print(f'{what}, run by {engine} ({instruction_set()}): tokens {errors[engine]:.4f}', flush=True)
    return errors


def exported(model: nn.Module, images: torch.Tensor, calibration: list[torch.Tensor]) -> bytes:
    """The graph of an SFormer in integers that gives all final tokens."""
    network = copy.deepcopy(model)
    sformer.to_integer_(network, batches=calibration)
    to_graph_(network)
    return to_onnx(Tokens(network, images)).SerializeToString()


def main(
        checkpoint: Annotated[Path, typer.Argument(help='Source that scripts/saliency_source.py built')],
        images: Annotated[str, typer.Option(help='Images: a folder, parquet files, a data set of the Hub')],
        levels: Annotated[
            Optional[list[int]], typer.Argument(help='Numbers of levels N  [default: that of the recipe]')] = None,
        split: Annotated[Optional[str], typer.Option(help='Split of these images')] = None,
        calibration: Annotated[
            Optional[str], typer.Option(help='Other images to calibrate with, such as dead-leaves')] = None,
        num_images: Annotated[int, typer.Option(help='Images to calibrate with')] = 128,
        num_test: Annotated[int, typer.Option(help='Images to test with')] = 48,
        seed: int = 0,
        recipe: Annotated[str, typer.Option(help='Recipe of the neurons')] = 'default',
        config: Annotated[Optional[list[str]], typer.Option(help='Field of SFNConfig, key=value')] = None,
        fit: Annotated[Optional[list[str]], typer.Option(help='Field of FitConfig, key=value')] = None,
        sites: Annotated[bool, typer.Option('--sites', help='What each kind of site makes alone')] = False,
        integer: Annotated[bool, typer.Option('--integer', help='What int8 weights add')] = False,
        engines: Annotated[bool, typer.Option('--engines', help='The same as engines run it')] = False,
        plain: Annotated[bool, typer.Option('--plain-int8', help='The quantised source, without neurons')] = False,
        nncf: Annotated[bool, typer.Option('--nncf', help='The source as NNCF quantises it')] = False,
        output: Annotated[Optional[Path], typer.Option('-o', '--output', help='JSON')] = None,
) -> None:
    source = load_source(checkpoint)
    test, others, data = split_images(source, images, split, num_test, num_images, seed)
    expected = outputs(source, test)
    record: dict[str, Any] = dict(
        model=MODEL, checkpoint_sha256=file_hash(checkpoint), source_sha256=state_hash(source.state_dict()),
        images=dict(name=data.name, split=data.split, revision=data.revision, fingerprint=data.fingerprint, seed=seed,
                    num_test=num_test, sites=SITES_IMAGES),
        versions=library_versions(), results=[])
    if plain:
        record['plain_int8'] = measure_graph(
            'plain int8', plain_int8(Tokens(source, test), others), ENGINES, test, expected[-1])
    if nncf:
        record['nncf'] = measure_graph(
            'NNCF', nncf_graph(Tokens(source, test), others.split(1)), ['openvino'], test, expected[-1])
    for n in levels or [SFNConfig.recipe(recipe).levels]:
        sfn, fitting = recipe_configs(recipe, dict(key_values(config), levels=n), key_values(fit))
        batches = calibration or others.split(BATCH_SIZE)
        start = time.process_time()
        model = sformer.convert(source, batches, sfn, fitting, num_images=num_images, seed=seed)
        seconds = time.process_time() - start
        print(f'converted in {seconds:.0f} s of processor time', flush=True)
        used = dataclasses.asdict(model.conversion.calibration)
        if not calibration:
            used.update(name=data.name, split=data.split, seed=seed, fingerprint=data.fingerprint)
        record['results'].append(dict(
            config=dataclasses.asdict(sfn), fit=dataclasses.asdict(fitting), calibration=used,
            processor_seconds=seconds,
            **measure(copy.deepcopy(model) if engines else model, test, expected, sites,
                      list(others.split(BATCH_SIZE)) if integer else None)))
        if engines:
            graph = exported(model, test, list(others.split(BATCH_SIZE)))
            record['results'][-1]['engines'] = measure_graph(
                f'{recipe}, N = {n}, int8 weights', graph, ENGINES, test, expected[-1])
        if output:
            write_json(output, record)


if __name__ == '__main__':
    typer.run(main)
