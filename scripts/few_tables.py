"""Tables of few levels and few spikes, which scripts/make_tables.py writes."""
from typing import Any

from figure_files import DROPPED, dropped, error_of_drop, fidelity, names, of_pairs, read, table

from sformer.profiling.energy import TWIN, ratio_to

KEYS_REST = {  # files of scripts/fidelity.py
    'silent': 'none', 'keys_rest': 'the mean of all values'}
NETWORKS = {  # of the ablation
    'vit_small_saliency': 'ViT-S',
    'sformer_micro.cifar10': 'micro',
    'sformer_eva02_micro.cifar10': 'EVA-02 micro',
}


def feedback() -> str:
    """Networks whose neurons feed back to one another and whose attention is balanced, beside plain ones."""
    rows = []
    for name, said in (('two', 'N = 2'), ('four', 'N = 4'), ('few', 'N = 8')):
        found = [fidelity(file) if f'fidelity_{file}' in names() else None
                 for file in (name, f'{name}_lateral', f'{name}_byte', f'{name}_high')]
        share = next((result['feedback'] for result in found[1:] if result), None)
        if share is None:
            continue
        rows.append([said, *(f'{result["tokens"]:.4f}' if result else '' for result in found),
                     f'{share["graded"]:.1%}', f'{share["dense"]:.1%}'])
    return table(['levels', 'by themselves', 'balanced, with feedback, G = 8', 'and a softmax of a byte',
                  'and reconstruction', 'operations that lateral spikes cause', 'if all were sent'], rows)


def few_levels() -> str:
    """Accuracy of networks with few levels that feed back; names of SFormers are those of the commands."""
    rows = [[f'`{result["model"]}`', f'{result["num_images"]:,}', f'{result["source_top1"]:.2f}', *dropped(result)]
            for name in ('compare_few', 'compare_micro') for result in read(name)]
    return table(['SFormer', 'images', 'source [%]', *DROPPED], rows)


def feedback_in_integers() -> str:
    """Errors of networks whose neurons feed back, simulated and with int8 weights by engines."""
    files = [read(f'compare_micro_lateral{engine}') for engine in ('', '_openvino', '_onnxruntime')]
    rows = [[results[0]['model'].removeprefix('l'), *(f'{result["relative_logit_error"]:.4f}' for result in results)]
            for results in zip(*files, strict=True)]
    return table(['N', 'simulated', 'int8 weights, OpenVINO', 'int8 weights, ONNX Runtime'], rows)


def keys_that_rest() -> str:
    """A price of activity on a network that was trained at scale, and what silent keys count as."""
    rows = []
    for name, said in KEYS_REST.items():
        found = fidelity(name)
        spikes = found['spikes_per_neuron']
        rows.append([said, f'{found["tokens"]:.4f}', f'{spikes["graded"]:.3f}', f'{spikes["binary"]:.2f}'])
    return table(['silent keys count as', 'relative error', 'activity', 'binary spikes'], rows)


def silent_maps() -> str:
    """Heat maps of a network whose neurons are silent."""
    result, = read('heatmaps_keys_rest')['results']
    return table(['activity', 'all pixels', 'mean per photograph', 'median', 'least'], [[
        f'{result["activity"]:.3f}', *(f'{result[key]:.4f}' for key in ('pooled', 'mean', 'median', 'least'))]])


def concentrated() -> str:
    """Networks whose heads and residual stream are in principal components, and which are silent."""
    rows = []
    for result in [*read('compare_concentrated'), read('compare_concentrated_vit_small')]:
        name, energy = result['model'], ''
        drop = f'{result["source_top1"] - result["top1"]:.2f} +- {error_of_drop(result):.2f}'
        if f'profile_concentrated_{name}' in names():
            accounts = read(f'profile_concentrated_{name}')['energy']['account']
            ratio, low, high = ratio_to(accounts['graded'], accounts[TWIN])
            energy = f'{ratio:.2f} ({low:.2f} to {high:.2f})'
        rows.append([f'`{name}`', f'{result["num_images"]:,}', f'{result["activity"]:.3f}', drop,
                     f'{result["agreement"]:.2f}', f'{result["relative_logit_error"]:.4f}', energy])
    return table(['SFormer', 'images', 'activity', 'drop [points]', 'agreement [%]', 'relative logit error',
                  'energy over the twin, graded'], rows)


def ablated() -> dict[tuple[str, int], dict[str, Any]]:
    """Rows of the ablation by idea, of each network and number of levels."""
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for row in read('ablation')['results']:
        found.setdefault((row['network'], row['levels']), {})[row['idea']] = row
    return found


def left_out() -> str:
    """Errors with one idea of the recipe left out; nothing where that leaves neurons as they are."""
    found = {column: rows for column, rows in ablated().items() if sum(row['left_out'] for row in rows.values()) > 1}
    ideas = dict.fromkeys(idea for rows in found.values() for idea, row in rows.items() if row['left_out'])
    rows = [[idea, *(f'{rows[idea]["error"]:.4f}' if idea in rows else '' for rows in found.values())]
            for idea in ideas]
    return table(['left out', *(f'{NETWORKS[name]}, N = {n}' for name, n in found)], rows)


def added() -> str:
    """Errors with ideas added, and what they cost over the SFormer without them."""
    rows = []
    for (name, n), ideas in ablated().items():
        plain = ideas['nothing']
        for idea, row in ideas.items():
            if row['left_out'] and row is not plain:
                continue
            operations = row['operations']['graded'] / plain['operations']['graded']
            cells = [f'{row["error"]:.4f}', f'{row["activity"]:.3f}', f'{operations:.2f}', of_pairs(row['time'])]
            rows.append([NETWORKS[name], str(n), idea, *cells])
    return table(['network', 'N', 'added', 'relative error', 'activity', 'operations', 'time'], rows)


def trained() -> str:
    """A network with a price of activity that was trained to follow its source."""
    result = read('compare_trained')
    return table(['SFormer', 'images', 'top-1 [%]', *DROPPED, 'unary spikes per neuron'],
                 [[f'`{result["model"]}`', f'{result["num_images"]:,}', f'{result["top1"]:.2f}', *dropped(result),
                   f'{result["spikes_per_neuron"]["unary"]:.2f}']])


def silence() -> str:
    """Networks with a price of activity; `s8_0.005` is N = 8 at a price of 0.005, `c8_0.005` the same with weights that
    compensate."""
    rows = []
    for result in read('compare_silence'):
        levels, price = result['model'][1:].split('_')
        kind = 'weights compensate' if result['model'].startswith('c') else 'weights of the source'
        rows.append([kind, levels, price, *dropped(result), f'{result["spikes_per_neuron"]["unary"]:.2f}'])
    return table(['small ViT', 'N', 'price', *DROPPED, 'unary spikes per neuron'], rows)
