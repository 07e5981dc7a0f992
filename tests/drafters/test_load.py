"""From a drafter's name to its checkpoint."""

from pathlib import Path

import pytest

from dspark.drafters.load import drafter_folder


@pytest.mark.parametrize("model", ["path", ".", "..", "../../model"])
def test_none_is_shipped_for_a_folder(tmp_path: Path, model: str):
    """The name of a shipped checkpoint was joined to the model's path, which led to the model itself: that it is no
    Qwen3DSparkModel was the answer to `--model /path/to/model`."""
    with pytest.raises(ValueError, match="no dspark drafter is shipped"):
        drafter_folder("dspark", str(tmp_path) if model == "path" else model)
