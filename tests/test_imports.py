"""Imports point one way, from the entry points to the models, and `import pixelllm` is light."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Lower layers never import higher ones.
LAYERS = (
    ("pixelllm.models", "pixelllm.weights", "pixelllm.losses", "pixelllm.boxes", "pixelllm.images",
     "pixelllm.config", "pixelllm.decoding", "pixelllm.devices", "pixelllm.files",
     "pixelllm.centers", "pixelllm.detection", "pixelllm.mask_codes", "pixelllm.squares",
     "pixelllm.markers", "pixelllm.vis_losses", "pixelllm.perception_config"),
    ("pixelllm.records", "pixelllm.tables", "pixelllm.alignment", "pixelllm.tokenizer",
     "pixelllm.checkpoints", "pixelllm.recipes", "pixelllm.contexts", "pixelllm.views",
     "pixelllm.paper_recipes", "pixelllm.scene_recipes", "pixelllm.generation",
     "pixelllm.model_card", "pixelllm.scenic", "pixelllm.locating",
     "pixelllm.marked_text", "pixelllm.templates", "pixelllm.conversations", "pixelllm.chats",
     "pixelllm.box_text",
     "pixelllm.batches", "pixelllm.feature_cache", "pixelllm.mixture",
     "pixelllm.shards", "pixelllm.sources", "pixelllm.streams", "pixelllm.processor",
     "pixelllm.loading", "pixelllm.quantize",
     "pixelllm.pretrained", "pixelllm.perceiving", "pixelllm.asked_images",
    "pixelllm.written", "pixelllm.perception_recipes",
     "pixelllm.pictures", "pixelllm.pages", "pixelllm.viewer",
     "pixelllm.overlays", "pixelllm.dense_page"),
    ("pixelllm.training", "pixelllm.evaluation"),
    ("pixelllm.cli", "pixelllm.commands", "pixelllm.plan", "pixelllm.plan_perception", "data"),
    ("train", "eval"),
)  # fmt: skip
FORBIDDEN = {
    "pixelllm.models": ("pixelllm.records", "pixelllm.batches", "pixelllm.training"),
    "pixelllm.training": ("pixelllm.evaluation",),
    "pixelllm.evaluation": ("pixelllm.training",),
    "pixelllm": ("data", "train", "eval"),
    "data": ("pixelllm.models", "pixelllm.training", "pixelllm.pretrained"),
}


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def our_modules() -> dict[str, Path]:
    files = [ROOT / "train.py", ROOT / "eval.py", *ROOT.glob("data/**/*.py")]
    return {module_name(file): file for file in [*files, *ROOT.glob("pixelllm/**/*.py")]}


def imported(file: Path, modules: set[str]) -> set[str]:
    """Our modules that the file imports when it is loaded; type checking alone does not count."""
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found & modules


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    modules = our_modules()
    return {name: imported(file, set(modules)) for name, file in modules.items()}


def is_in(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def layer(module: str) -> int:
    found = [i for i, names in enumerate(LAYERS) if any(is_in(module, name) for name in names)]
    assert len(found) == 1, f"{module} belongs to layers {found}; add it to LAYERS"
    return found[0]


def test_imports_point_to_lower_layers(graph):
    wrong = [
        f"{module} imports {other}"
        for module, others in graph.items()
        for other in others - {"pixelllm"}
        if module != "pixelllm" and layer(other) > layer(module)
    ]
    assert not wrong


def test_some_parts_never_meet(graph):
    wrong = [
        f"{module} imports {other}"
        for module, others in graph.items()
        for other in others
        for part, names in FORBIDDEN.items()
        if is_in(module, part) and any(is_in(other, name) for name in names)
    ]
    assert not wrong


def test_there_is_no_cycle(graph):
    """The package's lazy names are left out: they are looked up when all is loaded."""
    try:
        list(TopologicalSorter({m: o for m, o in graph.items() if m != "pixelllm"}).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_importing_the_package_is_light_and_gives_the_model():
    code = (
        "import sys, pixelllm; assert 'torch' not in sys.modules\n"
        "from pixelllm import PixelLLM, Processor\n"
        "assert PixelLLM.__name__ == 'PixelLLM' and callable(PixelLLM.from_pretrained)\n"
        "assert Processor.__module__ == 'pixelllm.processor'\n"
        "assert pixelllm.PerceptionGPT.__module__ == 'pixelllm.perceiving'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
