"""Training goes on where it ended, trains what it should, and sees what it should."""
import copy
import dataclasses

import pytest
import torch
from detection_tools import small_detector, write_annotations, write_coco
from PIL import Image, ImageOps
from torchvision.models.detection.roi_heads import RoIHeads

from sformer.conversion.training_state import TrainingState
from sformer.detection import TrainingConfig, open_coco, train_, training
from sformer.errors import SFormerError

CONFIG = TrainingConfig(epochs=2, batch_size=2)


@pytest.fixture(scope='module')
def few(tmp_path_factory):
    root = tmp_path_factory.mktemp('few')
    write_coco(root, num=3)
    return open_coco(root, 'train', masks=True)


@pytest.fixture(scope='module')
def trained(few, tmp_path_factory):
    detector = small_detector(masks=True)
    return detector, train_(detector, few, CONFIG, tmp_path_factory.mktemp('trained'))


def test_pyramid_and_heads_learn_on_a_frozen_backbone(trained):
    detector, history = trained
    new = small_detector(masks=True)
    same = {name for name, p in new.named_parameters() if torch.equal(p, detector.state_dict()[name])}
    vit = {f'backbone.vit.{name}' for name, _ in new.backbone.vit.named_parameters()}
    assert vit <= same and len(same) < len(vit) + 10  # biases that nothing has moved
    assert history[1]['loss_classifier'] < history[0]['loss_classifier']
    assert set(history[0]) == {
        'loss_objectness', 'loss_rpn_box_reg', 'loss_classifier', 'loss_box_reg', 'loss_mask'}


def test_a_run_that_was_killed_goes_on(trained, few, tmp_path, monkeypatch):
    save = TrainingState.save

    def killed(*args):
        save(*args)
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(TrainingState, 'save', killed)
        with pytest.raises(KeyboardInterrupt):
            train_(small_detector(masks=True), few, CONFIG, tmp_path)
    detector = small_detector(masks=True)
    history = train_(detector, few, CONFIG, tmp_path)
    assert history == trained[1][1:]
    assert all(torch.equal(a, b) for a, b in zip(
        detector.state_dict().values(), trained[0].state_dict().values(), strict=True))
    training.remove_state(tmp_path)
    assert not [*tmp_path.iterdir()]


def test_state_of_another_training_is_refused(few, tmp_path):
    config = dataclasses.replace(CONFIG, epochs=1)
    train_(small_detector(), few, config, tmp_path)
    assert train_(small_detector(), few, config, tmp_path) == []  # which has come to its end
    for detector, how in ((small_detector(seed=0), config), (small_detector(), dataclasses.replace(config, seed=1))):
        with pytest.raises(SFormerError, match='with other data or options'):
            train_(detector, few, how, tmp_path)


def test_maps_are_of_the_images_that_are_there(tmp_path):
    """Other images in the same folder, of the same annotations or others, are trained on by maps of their own."""
    def inverted(split):
        for path in (tmp_path / split).iterdir():
            ImageOps.invert(Image.open(path)).save(path)
        return open_coco(tmp_path, split)

    def losses(data, state):
        found = train_(small_detector(), data, CONFIG, tmp_path / state)
        (tmp_path / state / training.STATE_NAME).unlink()
        return found
    for split in ('train', 'other'):
        write_coco(tmp_path, split, num=2)
    first, other = losses(open_coco(tmp_path, 'train'), 'state'), inverted('other')
    assert losses(other, 'state') == losses(other, 'new') != first
    replaced = inverted('train')
    assert losses(replaced, 'state') == losses(replaced, 'newer') != first


def test_state_of_a_training_on_other_images_is_refused(tmp_path):
    write_coco(tmp_path, num=2)
    config = dataclasses.replace(CONFIG, epochs=1)
    train_(small_detector(), open_coco(tmp_path, 'train'), config, tmp_path)
    image = Image.open(tmp_path / 'train' / '0.png')
    ImageOps.invert(image).save(tmp_path / 'train' / '0.png')
    with pytest.raises(SFormerError, match='with other data or options'):
        train_(small_detector(), open_coco(tmp_path, 'train'), config, tmp_path)


@pytest.mark.parametrize('images, epochs, batch_size', [(1, 1, 2), (5, 2, 1), (11, 1, 1)])
def test_so_few_steps_that_none_rises(tmp_path, images, epochs, batch_size, monkeypatch):
    """Ten in all divided by zero, and one alone was taken at a millionth of the learning rate."""
    write_coco(tmp_path, num=images, sizes=((64, 96),))
    rates = []
    monkeypatch.setattr(torch.optim.AdamW, 'step', lambda self: rates.append(self.param_groups[0]['lr']))
    train_(small_detector(), open_coco(tmp_path, 'train'), TrainingConfig(epochs, batch_size, 0.01), tmp_path / 'state')
    assert len(rates) == -(images // -batch_size) * epochs
    assert max(rates) == pytest.approx(0.01, rel=0.2) and rates[-1] == min(rates)


@pytest.mark.parametrize('change', [
    lambda data: data['annotations'].clear(), lambda data: [a.update(iscrowd=1) for a in data['annotations']]])
def test_nothing_is_learnt_from_nothing(tmp_path, change):
    data = write_coco(tmp_path, num=2)
    change(data)
    write_annotations(tmp_path, data)
    with pytest.raises(SFormerError, match='train.json has no annotation of a single object'):
        train_(small_detector(), open_coco(tmp_path, 'train'), CONFIG, tmp_path / 'state')
    assert not (tmp_path / 'state').exists()


@pytest.mark.parametrize('box', [[96.2, 5, 0.7, 9], [-0.9, 5, 0.9, 9], [5, 5, 1e-7, 9]])
def test_boxes_that_vanish_are_no_matter_of_the_learning_rate(tmp_path, box):
    data = write_coco(tmp_path, num=1)
    data['annotations'][0]['bbox'] = box
    write_annotations(tmp_path, data)
    with pytest.raises(SFormerError, match='annotation 1 has a box of no size within its image'):
        open_coco(tmp_path, 'train')
    history = train_(small_detector(), open_coco(tmp_path, 'train', skip_bad=True), CONFIG, tmp_path / 'state')
    assert all(loss == loss for losses in history for loss in losses.values())


def test_last_blocks_learn_if_asked(few, tmp_path):
    detector = small_detector()
    before = copy.deepcopy(detector.backbone.vit.state_dict())
    train_(detector, few, TrainingConfig(epochs=1, trained_blocks=1), tmp_path)
    changed = {name.split('.')[1] for name, value in detector.backbone.vit.state_dict().items()
               if not torch.equal(value, before[name]) and name.startswith('blocks')}
    assert changed == {str(len(detector.backbone.vit.blocks) - 1)}


@pytest.mark.parametrize('trained_blocks', [0, 1])
def test_mixed_precision(few, tmp_path, trained, trained_blocks, monkeypatch):
    seen = []
    match = RoIHeads.select_training_samples
    monkeypatch.setattr(RoIHeads, 'select_training_samples', lambda self, proposals, targets: seen.extend(
        p.dtype for p in proposals) or match(self, proposals, targets))
    config = dataclasses.replace(CONFIG, amp=True, trained_blocks=trained_blocks)
    detector = small_detector(masks=True)
    history = train_(detector, few, config, tmp_path)
    assert all(p.dtype == torch.float32 for p in detector.parameters()) and {*seen} == {torch.float32}
    assert not any('forward' in vars(module) for module in detector.modules())
    for expected, losses in zip(trained[1], history, strict=True):
        assert losses != expected
        assert all(abs(losses[name] - expected[name]) < 0.1 * expected[name] for name in ('loss_mask', 'loss_box_reg'))


def test_boxes_and_masks_are_mirrored_with_the_image(few):
    for mirrored in (False, True):
        image, target = training.training_example(few, 10, mirrored)
        x0, y0, x1, y1 = target['boxes'][1].int().tolist()  # the blue square
        assert image[2, y0:y1, x0:x1].mean() > 0.5 and image[0, y0:y1, x0:x1].mean() < 0.4
        assert target['masks'][1].bool()[y0:y1, x0:x1].all()
    assert not torch.equal(image, few.image(10))


def test_batches_are_of_one_size_and_cover_all(data):
    orders = [[*training.epoch_batches(data, CONFIG, epoch)] for epoch in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    for order in orders:
        assert sorted(id for batch in order for id, _ in batch) == [*data.images]
        assert all(len({data.images[id].width for id, _ in batch}) == 1 for batch in order)


def test_a_loss_that_explodes_is_an_error(few, tmp_path):
    detector = small_detector()
    detector.roi_heads.box_predictor.cls_score.bias.data.fill_(float('nan'))
    with pytest.raises(SFormerError, match=r'the loss became nan in epoch 1: .*--lr'):
        train_(detector, few, CONFIG, tmp_path)
    assert not (tmp_path / training.STATE_NAME).exists()


def test_a_training_that_diverged_says_so(few, tmp_path, caplog):
    """Losses of 10^18 were reported like any others."""
    how = dataclasses.replace(CONFIG, lr=100.)
    train_(small_detector(), few, how, tmp_path)
    assert 'the training has diverged: the loss is ' in caplog.text and 'e+' in caplog.text
    caplog.clear()
    training.say_if_diverged(2.9, 5.7)
    assert not caplog.text


def test_gradients_are_clipped(few, tmp_path, monkeypatch):
    norms, step = [], torch.optim.AdamW.step

    def look(optimizer, *args, **kwargs):
        gradients = [p.grad for group in optimizer.param_groups for p in group['params'] if p.grad is not None]
        norms.append(torch.nn.utils.get_total_norm(gradients).item())
        return step(optimizer, *args, **kwargs)
    monkeypatch.setattr(torch.optim.AdamW, 'step', look)
    train_(small_detector(masks=True), few, dataclasses.replace(CONFIG, epochs=1), tmp_path)
    assert max(norms) == pytest.approx(1, abs=1e-3)
