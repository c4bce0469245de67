"""Layers that tests build are the same on every run; the weights of the source as a file."""
import pytest
import torch
from safetensors.torch import save_file


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)  # timm initialises from the global generator


@pytest.fixture
def checkpoint(tmp_path, source):
    path = tmp_path / 'digits.safetensors'
    save_file(source.state_dict(), path)
    return path
