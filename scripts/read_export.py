"""Logits of an SFormer in numpy, by a file that `sformer export --format safetensors` wrote (docs/format.md).

    python scripts/read_export.py model.safetensors images.npy     # normalised, (B, C, H, W)

It reads ViT and DeiT. What is multiplied is integers, whose sums in float64 are exact; the rest is in float32.
"""
import json
import math
import sys

import numpy as np
from safetensors import safe_open

READ = {'VisionTransformer', 'PatchEmbed', 'Sequential', 'Block', 'Attention', 'Mlp', 'Linear', 'Conv2d', 'LayerNorm',
        'LayerScale', 'GELU', 'none', 'Identity', 'Dropout', 'PatchDropout', 'token', 'avg', 'linear', 'convolution',
        'QK^T', 'AV', '', None}
ONE, ZERO, ERF = np.float32(1), np.float32(0), np.vectorize(math.erf)


class Network:
    def __init__(self, path):
        with safe_open(path, 'numpy') as file:
            self.about = json.loads(file.metadata()['sformer'])
            self.tensors = {name: file.get_tensor(name) for name in file.keys()}
        self.modules = self.about['modules']
        found = {kept.get(key) for kept in self.modules.values() for key in ('type', 'global_pool', 'approximate')}
        if unread := (found | {product['kind'] for product in self.about['products']}) - READ:
            raise SystemExit(f'{path}: this script does not read networks with {", ".join(sorted(unread))}.')

    def fire(self, neuron, x):
        """Levels k, whole numbers, that a neuron fires on a current, and the factor of its step for each token."""
        t = {name[len(neuron) + 1:]: t for name, t in self.tensors.items() if name.startswith(f'{neuron}.')}
        about, h, row = self.about['neurons'][neuron], x - t.get('center', ZERO), ONE
        if about['kind'] == 'pixels':
            return np.clip(np.round(h / t['step']), -128, 127).astype('f8'), row
        negative, size = h < 0, np.abs(h)
        u = size * (size >= t.get('quiet', ZERO)) / np.where(negative, t['threshold'][-1], t['threshold'][0])
        if about['token_share'] is not None:
            row = np.maximum(u.max(-1, keepdims=True), np.float32(1e-30)) * np.float32(about['token_share'])
            u = u / row
        y = np.insert(t['levels'].astype('f8'), 0, 0)[np.searchsorted(t['boundaries'], u, side='right')]
        k = y * np.where(negative, -about['signed'] * t['multiplier'][-1].astype('f8'), t['multiplier'][0])
        return np.clip(k, -t['counts'][1].astype('f8'), t['counts'][0]) if 'counts' in t else k, row

    def product(self, name, levels, row=ONE):
        """Levels (..., C) times weights (D, C), times the step of the output channel, plus the bias."""
        weight, columns = self.tensors[f'{name}.weight'], self.tensors.get(f'{name}.columns')
        levels = levels if columns is None else levels[..., columns]
        sums = (levels @ weight.reshape(len(weight), -1).T.astype('f8')).astype('f4')
        return sums * self.tensors.get(f'{name}.weight_step', ONE) * row + self.tensors.get(f'{name}.bias', ZERO)

    def linear(self, name, x):
        return self.product(name, *self.fire(f'{name}.neuron', x))

    def norm(self, name, x):
        if self.modules[name]['type'] == 'Identity':
            return x
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + np.float32(self.modules[name]['eps']))
        return x * self.tensors.get(f'{name}.weight', ONE) + self.tensors.get(f'{name}.bias', ZERO)

    def attention(self, name, x):
        shape, about, site, t = x.shape[:2], self.modules[name], f'{name}.products.0', self.tensors
        q, k, v = self.linear(f'{name}.qkv', x).reshape(*shape, 3, about['num_heads'], -1).transpose(2, 0, 3, 1, 4)
        q, q_row = self.fire(f'{site}.q_neuron', self.norm(f'{name}.q_norm', q))
        k, k_row = self.fire(f'{site}.k_neuron', self.norm(f'{name}.k_norm', k))
        v, _ = self.fire(f'{site}.v_neuron', v)
        step = (t[f'{site}.q_neuron.step'] * t[f'{site}.k_neuron.step'])[..., :1]  # as are all of a head
        rows = q_row * (k_row.swapaxes(-2, -1) if k_row.ndim else k_row) * step * np.float32(about['scale'])
        scores = (q @ k.swapaxes(-2, -1)).astype('f4') * rows
        a, _ = self.fire(f'{site}.attn_neuron', np.exp(scores - scores.max(-1, keepdims=True)))
        out = (a @ v / a.sum(-1, keepdims=True)).astype('f4') * t[f'{site}.v_neuron.step']
        out = (out + t.get(f'{site}.v_neuron.center', ZERO)).swapaxes(1, 2).reshape(*shape, -1)
        return self.linear(f'{name}.proj', self.norm(f'{name}.norm', out))

    def mlp(self, name, x):
        x = self.linear(f'{name}.fc1', x)
        return self.linear(f'{name}.fc2', self.norm(f'{name}.norm', (x * (1 + ERF(x / 2 ** .5)) / 2).astype('f4')))

    def __call__(self, images):
        """Logits (B, classes) of normalised images (B, C, H, W)."""
        (k, _), vit, t = self.fire('patch_embed.proj.neuron', images), self.modules[''], self.tensors
        (b, c, h, w), (p, q) = k.shape, t['patch_embed.proj.weight'].shape[2:]
        patches = k.reshape(b, c, h // p, p, w // q, q).transpose(0, 2, 4, 1, 3, 5).reshape(b, -1, c * p * q)
        x, position = self.product('patch_embed.proj', patches), t.get('pos_embed', ZERO)
        early, late = (position, ZERO) if vit['no_embed_class'] else (ZERO, position)
        x = [*(np.repeat(t[name], b, 0) for name in ('cls_token', 'reg_token') if name in t), x + early]
        x = self.norm('norm_pre', np.concatenate(x, 1) + late)
        for i in range(sum(module['type'] == 'Block' for module in self.modules.values())):
            for layer, part, j in ((self.attention, 'attn', 1), (self.mlp, 'mlp', 2)):
                y = layer(f'blocks.{i}.{part}', self.norm(f'blocks.{i}.norm{j}', x))
                x = x + y * t.get(f'blocks.{i}.ls{j}.gamma', ONE)
        x = self.norm('norm', x)
        x = dict(token=x[:, 0], avg=x[:, vit['num_prefix_tokens']:].mean(1)).get(vit['global_pool'], x)
        x = self.norm('fc_norm', x)
        return self.linear('head', x) if 'head.weight' in t else x


if __name__ == '__main__':
    print(Network(sys.argv[1])(np.load(sys.argv[2])).argmax(-1))
