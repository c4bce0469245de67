"""Libraries that people train and serve with: an SFormer goes through them, with equal logits and its thresholds."""
import copy
import json

import pytest
import timm
import torch
import torch.distributed as dist
from PIL import Image
from timm.utils import CheckpointSaver, ModelEmaV3

import sformer
from sformer import is_calibrated


def assert_same(network, model, images):
    with torch.no_grad():
        assert torch.equal(network(images), model(images))


def train_step(network, optimizer, images):
    network.train()
    loss = network(images).square().mean()
    loss.backward()
    optimizer.step()
    network.eval()


@pytest.fixture
def process_group(tmp_path):
    """Of this process alone."""
    dist.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_accelerate(model, images):
    from accelerate import Accelerator
    tuned = copy.deepcopy(model)
    accelerator = Accelerator(cpu=True)
    prepared, optimizer = accelerator.prepare(tuned, torch.optim.SGD(tuned.parameters(), 0.1))
    assert_same(prepared, model, images)
    train_step(prepared, optimizer, images)
    assert is_calibrated(accelerator.unwrap_model(prepared))
    with torch.no_grad():
        assert not torch.equal(prepared(images), model(images))


def test_distributed_data_parallel(model, images, process_group):
    tuned = copy.deepcopy(model)
    network = torch.nn.parallel.DistributedDataParallel(tuned)
    network.eval()
    assert_same(network, model, images)
    train_step(network, torch.optim.SGD(network.parameters(), 0.1), images)
    assert is_calibrated(tuned) and all(p.grad is not None for p in network.parameters())


def test_fully_sharded(model, images, process_group):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    sharded = copy.deepcopy(model)
    mesh = init_device_mesh('cpu', (1,))
    for block in sharded.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    assert_same(sharded, model, images)
    train_step(sharded, torch.optim.SGD(sharded.parameters(), 0.1), images)
    assert is_calibrated(sharded)


def test_checkpoints_of_timm(model, images, tmp_path):
    tuned = copy.deepcopy(model)
    optimizer = torch.optim.SGD(tuned.parameters(), 0.1)
    average = ModelEmaV3(tuned, decay=0.5)
    saver = CheckpointSaver(tuned, optimizer, model_ema=average, checkpoint_dir=tmp_path, recovery_dir=tmp_path)
    train_step(tuned, optimizer, images)
    average.update(tuned)
    average.eval()
    saver.save_checkpoint(0, metric=1.)
    again = copy.deepcopy(model)
    state = torch.load(tmp_path / 'last.pth.tar', weights_only=False)
    again.load_state_dict(state['state_dict'])
    assert_same(again, tuned, images)
    again.load_state_dict(state['state_dict_ema'])
    assert_same(again, average.module, images)
    assert is_calibrated(again)


def test_torch_save(model, images, tmp_path):
    torch.save(model, tmp_path / 'model.pt')
    torch.save(model.state_dict(), tmp_path / 'state.pt')
    whole = torch.load(tmp_path / 'model.pt', weights_only=False)
    assert_same(whole, model, images)
    again = sformer.spiking_(sformer.source_of(model), model.sfn_config)
    again.load_state_dict(torch.load(tmp_path / 'state.pt', weights_only=True))
    assert_same(again.eval(), model, images)


@pytest.mark.filterwarnings('ignore')
def test_pipeline_of_transformers(tmp_path):
    """TimmWrapper preprocesses, calls and names classes as the config says."""
    transformers, datasets = pytest.importorskip('transformers'), pytest.importorskip('sklearn.datasets')
    model = timm.create_model('sformer_nano.digits', pretrained=True, in_chans=3)  # a pipeline reads colour images
    classify = transformers.pipeline('image-classification', model=str(sformer.save_model(model, tmp_path / 'saved')))
    assert is_calibrated(classify.model)
    digits = datasets.load_digits().images[:5]
    for label, digit in enumerate(digits):
        image = Image.fromarray((digit * 255 / 16).astype('uint8')).convert('RGB')
        assert classify(image, top_k=1)[0]['label'] in (str(label), f'LABEL_{label}')
    names = ['null', 'eins', 'zwei', 'drei', 'vier', 'fünf', 'sechs', 'sieben', 'acht', 'neun']
    model.pretrained_cfg['label_names'] = names
    folder = sformer.save_model(model, tmp_path / 'named')
    config = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
    assert config['label_names'] == names and config['id2label'] == {str(i): name for i, name in enumerate(names)}
    assert config['label2id']['fünf'] == 5 and 'label_names' not in config['pretrained_cfg']
    classify = transformers.pipeline('image-classification', model=str(folder))
    image = Image.fromarray((digits[3] * 255 / 16).astype('uint8')).convert('RGB')
    assert classify(image, top_k=1)[0]['label'] == 'drei'
    for load in (sformer.load_model, lambda path: timm.create_model(f'local-dir:{path}', pretrained=True)):
        assert load(folder).pretrained_cfg['label_names'] == names
