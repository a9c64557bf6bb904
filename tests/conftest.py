"""One thread per process: two processes beat two threads for models this small, and results repeat."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def embedded_folder(tmp_path_factory):
    """The built-in model, untrained, as a Hugging Face folder."""
    from m2rl import embedded

    folder = tmp_path_factory.mktemp("embedded")
    embedded.save(folder, seed=0)
    return folder
