from __future__ import annotations

import doctest
import subprocess
import sys
from pathlib import Path

import pixelllm.evaluation


def test_the_examples_of_the_package_hold():
    result = doctest.testmod(pixelllm.evaluation)
    assert result.attempted > 10 and result.failed == 0


def test_scores_need_neither_the_model_nor_its_libraries():
    code = (
        "import sys, pixelllm.evaluation\n"
        "assert 'numpy' not in sys.modules\n"
        "from pixelllm.evaluation import *\n"
        "assert callable(score_dense_captions) and callable(score_meteor)\n"
        "assert not {'torch', 'transformers', 'datasets'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])
