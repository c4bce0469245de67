"""Layers that tests build are the same on every run."""
import pytest
import torch


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)  # timm initialises from the global generator
