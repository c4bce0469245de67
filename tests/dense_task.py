"""A third task, dense prediction, as somebody adds it: all of it is in this file.

A toy: a class per pixel, by a head on the map of a vision transformer with random weights. Its results are of how far
an SFormer agrees with its source.
"""
import copy
import dataclasses
import json
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from sformer.conversion import CalibrationRecord, Conversion, calibrate_, calibration_batches
from sformer.data.image_files import name_of_image
from sformer.evaluation.figures import CLASSIFICATION
from sformer.evaluation.predictions import Finding, Prediction, Reader
from sformer.evaluation.schema import PERCENT, Figure, Schema
from sformer.execution import export_onnx
from sformer.files import state_hash
from sformer.layers import named_neurons, source_view, spiking_
from sformer.models import set_pixel_range_
from sformer.neurons import SFNConfig
from sformer.saving import weights_of, write_model
from sformer.tasks import Description, Task, register_task

SIDE = 32

SCHEMA = Schema('segmenters', first='pixel_agreement', mark='pixel_agreement')
SCHEMA.register(
    *(CLASSIFICATION.figures[key] for key in (
        'model', 'architecture', 'dataset', 'split', 'num_images', 'weights_sha256', 'command')),
    Figure(
        key='pixel_agreement', meaning='pixels of the same class as of the source', check=PERCENT, unit='%',
        needed=True, pair=True, label='pixels as of the source', listed='pixels as of the source [%]',
        head='agree [%]', said='{:.2f} % of the pixels as the source has them'))


class Segmenter(nn.Module):
    """Images (B, 3, 32, 32) to logits (B, classes, 32, 32)."""

    def __init__(self, classes):
        super().__init__()
        self.vit = timm.create_model('test_vit', depth=2, num_classes=0, img_size=SIDE, patch_size=8)
        self.head = nn.Conv2d(self.vit.num_features, classes, 1)
        self.num_classes = classes
        self.pretrained_cfg = dict(architecture='segmenter', input_size=(3, SIDE, SIDE), mean=(.5,) * 3, std=(.5,) * 3,
                                   crop_pct=1., interpolation='bilinear')

    def forward(self, x):
        tokens = self.vit.forward_features(x)[:, self.vit.num_prefix_tokens:]
        rows, columns = self.vit.patch_embed.grid_size
        classes = self.head(tokens.transpose(1, 2).unflatten(2, (rows, columns)))
        return F.interpolate(classes, scale_factor=8, mode='bilinear')


class Dense(Task):
    name, key = 'dense', 'segmenter'
    noun = title = 'segmenter'
    metric = 'mean_iou'
    options = {'convert': ('batch_size',), 'evaluate': ('batch_size',), 'profile': ('batch_size',)}

    def owns(self, model):
        return isinstance(model, Segmenter)

    def architecture(self, model):
        return 'segmenter'

    def load(self, path, revision=None, cache_dir=None):
        config = json.loads((Path(path) / 'config.json').read_text())
        model = Segmenter(**config['segmenter']).eval()
        if 'sfn' in config:
            spiking_(model, SFNConfig(**config['sfn']))
            model.sfn, model.conversion = SFNConfig(**config['sfn']), Conversion.from_dict(config['sformer'])
        model.load_state_dict(load_file(Path(path) / 'model.safetensors'))
        return model

    def save(self, model, directory, overwrite=False):
        def write_config(aside, weights_sha256):
            config = dict(segmenter=dict(classes=model.num_classes), architecture='segmenter',
                          weights_sha256=weights_sha256)
            if any(True for _ in named_neurons(model)):
                config.update(sfn=dataclasses.asdict(model.sfn), sformer=model.conversion.to_dict())
            (aside / 'config.json').write_text(json.dumps(config))
        return write_model(weights_of(model), Path(directory), write_config, overwrite)

    def convert(self, source, images, config, fit, command, options):
        model = copy.deepcopy(self.open(source))
        model.sfn = config
        set_pixel_range_(spiking_(model, config), (.5,) * 3, (.5,) * 3)
        batches, used = self.batches(model, images, options.batch_size)
        count = calibrate_(model, batches, fit.settled(True))
        model.conversion = Conversion(
            source='test_vit', calibration=CalibrationRecord(**used, num_images=count), command=command)
        return model

    def evaluate(self, names, request):
        results = []
        for name in names:
            model, same = self.open(name), []
            images = dataclasses.replace(request.images, num_images=request.images.num_images or 16)
            batches, used = self.batches(model, images, request.options['batch_size'])
            with torch.inference_mode():
                for batch in batches:
                    found, expected = model(batch).argmax(1), source_view(model)(batch).argmax(1)
                    same += (found == expected).float().mean((1, 2)).tolist()
            results.append(SCHEMA.make(
                {}, model='segmenter', dataset=used['name'], split=used['split'], num_images=len(same),
                pixel_agreement=round(100 * sum(same) / len(same), 4), weights_sha256=state_hash(model.state_dict())))
        return results

    def predict(self, model, source, images, topk, batch_size):
        for index, image in enumerate(images):
            batch = Reader(model)(image)[None]
            with torch.inference_mode():
                pixels = model(batch)[0].softmax(0).mean((1, 2)).topk(min(topk, model.num_classes))
            yield Prediction(image=name_of_image(image, index), found=tuple(
                Finding(name=str(i), index=i, probability=share)
                for share, i in zip(pixels.values.tolist(), pixels.indices.tolist(), strict=True)))

    def compared_with(self, model, source):
        return source_view(source)

    def export(self, model, output, options):
        return export_onnx(model, output, max_error=options.max_error, command=options.command)

    def batches(self, model, images, batch_size):
        return calibration_batches(model, images, batch_size)[:2]

    def summary(self, result):
        return [f'{result["model"]}: {SCHEMA.compared(result)}']

    def describe(self, folder, model):
        config = json.loads((folder / 'config.json').read_text())
        return Description(
            config=config, architecture='segmenter', input_size=(3, SIDE, SIDE), num_classes=model.num_classes,
            built=config['segmenter'])

    def hub_task(self, built):
        return 'image-segmentation', 'Semantic Segmentation'

    def source_in_words(self, built, source):
        return f'a segmenter on {source}'

    def recipe(self, record):
        return [('classes of a pixel', record.built['classes'])]

    def usage(self, record):
        return f'import sformer\n\nmodel = sformer.load_model({record.load_name!r})'


register_task(Dense())
