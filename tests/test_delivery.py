"""What is delivered beside the weights: a failure means a card that lies, or a folder that others can't load."""

from pathlib import Path

import pytest
import yaml

from minitron_mcore.models import architecture

CONF = Path(__file__).parents[1] / "conf"


@pytest.fixture
def arch(tmp_path):
    def of(which, **sizes):
        import dataclasses

        fields = yaml.safe_load((CONF / "model" / f"{which}.yaml").read_text())["architecture"]
        return dataclasses.replace(architecture.given(fields), **sizes)

    return of
