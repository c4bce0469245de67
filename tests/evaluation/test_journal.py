"""The journal: what was recorded is not evaluated again, and records of other runs are left alone."""
import copy
import json
from importlib import metadata

import pytest
from evaluation_tools import steady

from sformer import EvaluationConfig, SFormerError, evaluate_all
from sformer.evaluation import Journal
from sformer.evaluation.launch import Group


class StopError(Exception):
    pass


def interrupted(model, at):
    """The model, and the images of each batch that it is given; the forward pass number `at` is its last."""
    model, batches = copy.deepcopy(model), []

    def look(neuron, args):
        batches.append(args[0].numpy().tobytes())
        if len(batches) == at:
            raise StopError
    model.patch_embed.proj.neuron.register_forward_pre_hook(look)  # pixels; the source has no neurons
    return model, batches


@pytest.mark.parametrize('streaming', [False, True])
def test_resumed_run_counts_the_same(model, digit_files, tmp_path, streaming, capsys):
    path = tmp_path / 'journal'
    config = EvaluationConfig(dataset=digit_files(3), streaming=streaming, batch_size=8)
    expected, = evaluate_all([model], config)
    stopped, first = interrupted(model, 14)
    with pytest.raises(StopError):
        evaluate_all([stopped], config, journal=Journal(path))
    file = next(path.glob('*/*.jsonl'))
    (file.parent / '0.jsonl').write_text('killed before it began')
    with open(file, 'a') as f:  # the kill came in the middle of a line
        f.write(file.read_text().splitlines()[-1][:-5])
    resumed, second = interrupted(model, 0)
    result, = evaluate_all([resumed], config, journal=Journal(path, resume=True))
    assert steady(result) == steady(expected)
    assert len(second) < 26 and len({*first} & {*second}) < 9, 'what was recorded is evaluated again'
    assert 'resuming after ' in capsys.readouterr().err


def run(model, path, resume=False, **options):
    journal = Journal(path, resume)
    evaluate_all([model], EvaluationConfig(dataset='digits', num_images=64, **options), journal=journal)
    return journal


def test_records_do_not_go_without_a_word(model, tmp_path, caplog):
    Journal(tmp_path).open(dict(models=['a']), Group())
    assert not caplog.text
    Journal(tmp_path, resume=True).open(dict(models=['a']), Group())
    assert not caplog.text
    Journal(tmp_path).open(dict(models=['a']), Group())
    assert 'has not ended: it starts over. --resume' in caplog.text


def test_journal_of_another_run(model, tmp_path):
    run(model, tmp_path)
    for options in (dict(batch_size=32), dict(amp='bf16'), dict(crop_pct=0.9)):
        with pytest.raises(SFormerError, match='records another run .* differ.*without --resume'):
            run(model, tmp_path, resume=True, **options)
    run(model, tmp_path)
    assert len(list(tmp_path.glob('*/*.jsonl'))) == 1, 'starting over forgets'


def test_journal_of_another_version(model, tmp_path, monkeypatch):
    run(model, tmp_path)
    version = metadata.version
    monkeypatch.setattr(metadata, 'version', lambda name: '0.0.1' if name == 'sformer' else version(name))
    with pytest.raises(SFormerError, match=r'records another run \(sformer differ\)'):
        run(model, tmp_path, resume=True)


def test_key_is_plain_data(model, tmp_path):
    """Nothing that depends on how an object prints itself."""
    run(model, tmp_path)
    line = next(tmp_path.glob('*/*.jsonl')).read_text().splitlines()[0]
    key = json.loads(line.partition(' ')[2])
    assert key['preprocessing'] == [dict(
        input_size=[1, 8, 8], interpolation='bilinear', mean=[.5], std=[.5], crop_pct=1., crop_mode='center')]
    assert key['models'][0].keys() == {'weights_sha256', 'architecture', 'arguments'}
    assert not any(sign in line for sign in ('<', 'object at', 'torch.'))


def test_models_that_only_arguments_tell_apart(model, tmp_path, capsys):
    """With equal weights, other heads are another network, whose records are of no use."""
    other = copy.deepcopy(model)
    other._model_args = dict(other._model_args, num_heads=2)
    run(model, tmp_path)
    run(other, tmp_path, resume=True)
    assert 'resuming' not in capsys.readouterr().err
    assert len(list(tmp_path.glob('*/*.jsonl'))) == 2


def test_home_folder(model, tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    run(model, '~/journal')
    assert len(list(tmp_path.glob('journal/*/*.jsonl'))) == 1


def test_journals_of_several_runs(model, source, tmp_path, capsys):
    """Of other models or other images, on the way to the same results file."""
    runs = (model, {}), (source, {}), (model, dict(seed=1))
    journals = []
    for other, options in runs:
        journals.append(run(other, tmp_path, resume=True, **options))
    assert len(list(tmp_path.glob('*/*.jsonl'))) == 3 and 'resuming' not in capsys.readouterr().err
    journals[1].remove()
    run(model, tmp_path, resume=True)
    assert 'resuming after 64 of 64' in capsys.readouterr().err
    journals[0].remove()
    journals[2].remove()
    assert not tmp_path.exists()
