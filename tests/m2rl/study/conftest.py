import dataclasses

import pytest

from m2rl.study.definition import read


@pytest.fixture
def made():
    """The embedded study at a tenth of its steps."""
    return dataclasses.replace(read("study_embedded")[0], scale=0.1)
