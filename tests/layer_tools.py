"""What tests of layers and calibration share: small networks of every family, and a watch on their products."""
import contextlib
import copy
from typing import NamedTuple

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm import layers as tl
from timm.models import vision_transformer as vit
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision import ops
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor

from sformer import FitConfig, SFNConfig, calibrate_, named_neurons, spiking_
from sformer.neurons import Neuron

SMALL = dict(img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2, num_classes=7)

# family -> name of timm's entry point and arguments; one block has all layers of a family, a ViT shows what two do
FAMILIES = {
    'vit': ('vit_tiny_patch16_224', dict(depth=2)),
    'deit distilled': ('deit_tiny_distilled_patch16_224', {}),
    'beit': ('beit_base_patch16_224', {}),
    'beit v2': ('beitv2_base_patch16_224', dict(use_rel_pos_bias=True)),
    'eva02': ('eva02_tiny_patch14_224', {}),
    'eva02 fused': ('eva02_tiny_patch14_224', dict(qkv_fused=True, scale_mlp=True)),
    'differential': ('vit_tiny_patch16_224', dict(attn_layer='diff')),
    'parallel scaling': ('vit_tiny_patch16_224', dict(block_fn=vit.ParallelScalingBlock)),
    'parallel scaling fused': ('vit_tiny_patch16_224', dict(
        block_fn=lambda *args, **kwargs: vit.ParallelScalingBlock(*args, fuse_out_proj=True, **kwargs))),
    'differential parallel scaling': ('vit_tiny_patch16_224', dict(block_fn=vit.DiffParallelScalingBlock)),
    'parallel things': ('vit_tiny_patch16_224', dict(block_fn=vit.ParallelThingsBlock)),
    'res post': ('vit_tiny_patch16_224', dict(block_fn=vit.ResPostBlock, init_values=0.1)),
    'qk norm': ('vit_tiny_patch16_224', dict(qk_norm=True)),
    'inner norms': ('vit_tiny_patch16_224', dict(scale_attn_norm=True, scale_mlp_norm=True)),
    'glu mlp': ('vit_tiny_patch16_224', dict(mlp_layer=tl.GluMlp)),
    'swiglu': ('vit_tiny_patch16_224', dict(mlp_layer=tl.SwiGLU)),
    'map pooling': ('vit_tiny_patch16_224', dict(global_pool='map')),
    'gated attention': ('vit_tiny_patch16_224', dict(attn_layer='gated')),
    'gated rope attention': ('eva02_tiny_patch14_224', dict(attn_layer='gated')),
}


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def randomise_(model, seed=0):
    """Weights as a trained model has them: timm starts with zero biases, and norms that do nothing."""
    generator = rng(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def build(family='vit', seed=0, **kwargs):
    """A small source network of a family, with random weights."""
    name, args = FAMILIES[family]
    args = {**SMALL, **args, **kwargs}
    gated = args.get('attn_layer') == 'gated'
    if gated:
        del args['attn_layer']
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)  # timm initialises from the global generator
        model = timm.create_model(name, **args)
        for block in model.blocks if gated else ():
            kind = tl.AttentionRope if name.startswith('eva') else tl.Attention
            block.attn = kind(args['embed_dim'], args['num_heads'], qkv_bias=True, gated=True)
    return randomise_(model, seed)


def pixels(n=8, seed=1, chans=3):
    """Normalised 8-bit pixels, (n, chans, 32, 32)."""
    return torch.randint(0, 256, (n, chans, 32, 32), generator=rng(seed)) / 127.5 - 1


def mask_rcnn(seed=0):
    """A small Mask R-CNN of torchvision, with batch norm as a trained network has it, that takes all it finds."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        width = 8
        backbone = nn.Sequential(
            ops.Conv2dNormActivation(3, width, 7, stride=4), nn.MaxPool2d(2),
            ops.Conv2dNormActivation(width, width, 3, groups=2, norm_layer=ops.FrozenBatchNorm2d))
        backbone.out_channels = width
        align = [ops.MultiScaleRoIAlign(['0'], size, 2) for size in (7, 14)]
        model = MaskRCNN(
            backbone, min_size=64, max_size=96, box_score_thresh=0., box_detections_per_img=6,
            rpn_post_nms_top_n_test=20, rpn_anchor_generator=AnchorGenerator(((16, 32),), ((0.5, 1.),)),
            box_roi_pool=align[0], box_head=TwoMLPHead(width * 49, 24), box_predictor=FastRCNNPredictor(24, 3),
            mask_roi_pool=align[1], mask_head=MaskRCNNHeads(width, (width, width), 1),
            mask_predictor=MaskRCNNPredictor(width, width, 3))
        for norm in (m for m in model.modules() if isinstance(m, (nn.BatchNorm2d, ops.FrozenBatchNorm2d))):
            norm.running_mean.normal_(std=0.3)
            norm.running_var.uniform_(0.5, 2.)
    return randomise_(model, seed)


def photographs(n=3, seed=1):
    """A list of images of several sizes, in [0, 1], as detectors read them."""
    return [torch.rand(3, 64 + 8 * i, 80 - 4 * i, generator=rng(seed + i)) for i in range(n)]


def tokens(n=3, length=6, dim=16, seed=2):
    return torch.randn(n, length, dim, generator=rng(seed))


def spiking(source, batch, config=SFNConfig(), fit=FitConfig(), forward_fn=None):
    """A calibrated spiking copy of a source."""
    model = spiking_(copy.deepcopy(source), config)
    calibrate_(model, [batch], fit, forward_fn)
    return model


def state_of(module):
    return {k: v.clone() for k, v in module.state_dict().items()}


def same_state(module, state):
    now = module.state_dict()
    return list(now) == list(state) and all(torch.equal(v, state[k]) for k, v in now.items())


def relative_error(out, reference):
    return ((out - reference).norm() / reference.norm()).item()


@contextlib.contextmanager
def hooked(module):
    """List of the outputs of a module."""
    outputs = []
    handle = module.register_forward_hook(lambda module, args, out: outputs.append(out.detach()))
    try:
        yield outputs
    finally:
        handle.remove()


# products

class Operand(NamedTuple):
    """Spikes in an operand of a product: `tensor = levels * step + center`, the step with its factor per token."""
    neuron: str
    tensor: torch.Tensor
    levels: torch.Tensor
    step: torch.Tensor
    center: torch.Tensor

    def map(self, tensor, scale=lambda x: x, move=lambda x: x):
        return Operand(self.neuron, tensor, move(self.levels), move(scale(self.step)), move(scale(self.center)))

    def check(self):
        """That the tensor at the product is what the neuron's spikes say, to float rounding."""
        expected = self.levels.double() * self.step.double() + self.center.double()
        size = self.step.double() * self.levels.double().abs().max() + self.center.abs().double()
        assert ((self.tensor.double() - expected).abs() <= 1e-6 * size).all(), f'{self.neuron} is not integer x step'


class ProductWatch(TorchFunctionMode):
    """Sees every product that a network computes, and which spikes are in it.

    Attributes:
        seen: Operands that were spikes, in order.
        analog: Names of the functions whose operand of activations was not, or that were met outside of a product.
        count: Products that were seen as function calls.
    """
    LINEAR = (F.linear, torch.conv2d, F.conv2d)
    MATMUL = (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm, torch.mm)
    MUL = (torch.mul, torch.Tensor.mul, torch.Tensor.__mul__, torch.Tensor.mul_)
    SCALE = MUL + (torch.div, torch.Tensor.div, torch.Tensor.__truediv__)

    def __init__(self, model):
        super().__init__()
        self.seen, self.analog, self.count, self.inside, self.tagged, self.handles = [], [], 0, 0, {}, []
        floats = (nn.LayerNorm, tl.RmsNorm, tl.SimpleNorm)
        for name, module in model.named_modules():
            if isinstance(module, Neuron):
                self.handles.append(module.register_forward_pre_hook(self._enter))
                self.handles.append(module.register_forward_hook(
                    lambda module, args, out, name=name: self._fired(name, module, args[0], out)))
            elif isinstance(module, floats):  # act on currents
                self.handles.append(module.register_forward_pre_hook(self._enter))
                self.handles.append(module.register_forward_hook(self._leave))

    def _enter(self, *args):
        self.inside += 1

    def _leave(self, *args):
        self.inside -= 1

    def _fired(self, name, neuron, x, out):
        spikes = neuron.encode(x)
        step = (spikes.step if spikes.token_scale is None else spikes.step * spikes.token_scale).expand(out.shape)
        center = torch.zeros_like(step) if spikes.center is None else spikes.center.expand(out.shape)
        self._tag(Operand(name, out, spikes.levels, step, center))
        self.inside -= 1

    def _tag(self, operand):
        self.tagged[id(operand.tensor)] = operand

    def _find(self, tensor):
        return self.tagged.get(id(tensor)) if isinstance(tensor, torch.Tensor) else None

    def _meet(self, func, *operands):
        for tensor in operands:
            operand = self._find(tensor)
            if operand is None:
                self.analog.append(getattr(func, '__name__', str(func)))
            else:
                operand.check()
                self.seen.append(operand)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if self.inside:
            return out
        if func in self.LINEAR:
            self.count += 1
            self._meet(func, args[0])
        elif func in self.MATMUL:
            self.count += 1
            self._meet(func, *args[:2])
        elif func is F.scaled_dot_product_attention:  # never met by a spiking layer
            self.count += 1
            self._meet(func, *args[:3])
        elif func in self.MUL and all(isinstance(v, torch.Tensor) and v.requires_grad for v in args[:2]):
            self._meet(func, *args[:2])  # two activations
        elif func in self.SCALE and isinstance(args[1], (int, float)) and self._find(args[0]):
            self._tag(self._find(args[0]).map(out, scale=lambda x: func(x.clone(), args[1])))
        elif func is torch.Tensor.transpose and self._find(args[0]):
            self._tag(self._find(args[0]).map(out, move=lambda x: x.transpose(*args[1:])))
        return out

    def close(self):
        for handle in self.handles:
            handle.remove()


class MultiplyCount(TorchDispatchMode):
    """Counts what is a product of matrices to the library, however it was written."""
    OPERATIONS = {'mm', 'bmm', 'addmm', 'baddbmm', 'addbmm', 'addmv', 'mv', 'dot', 'convolution', 'linear', 'matmul'}

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.count += name in self.OPERATIONS or 'attention' in name
        return func(*args, **(kwargs or {}))


def watch_products(model, *args, **kwargs):
    """Run a model under a watch.

    Returns:
        The watch, and the number of products of matrices that the library computed.
    """
    trainable = [p.requires_grad_(False) for p in model.parameters() if p.requires_grad]
    x = args[0].clone().requires_grad_()  # so that activations, and only they, require a gradient
    watch, counter = ProductWatch(model), MultiplyCount()
    try:
        with counter, watch:
            model(x, *args[1:], **kwargs)
    finally:
        watch.close()
        for parameter in trainable:
            parameter.requires_grad_(True)
    return watch, counter.count


def neuron_names(model):
    return [name for name, _ in named_neurons(model)]


def levels_of(model, images):
    """Levels of every neuron on some images, by path."""
    found, handles = {}, []
    for name, neuron in named_neurons(model):
        def keep(neuron, args, name=name):
            found[name] = neuron.encode(args[0]).levels.long()
        handles.append(neuron.register_forward_pre_hook(keep))
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return found
