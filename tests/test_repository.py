"""The files that are no code: what stands in the root, what is declared, what CI and forms say."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import wan
from utils.parsing import parse_toml

ROOT = Path(__file__).resolve().parents[1]
PROJECT = parse_toml((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

# A new file or folder of the root is listed here, once it is clear that it has no better place.
IN_THE_ROOT = {
    *(".ci", ".github", ".gitignore", ".pre-commit-config.yaml"),
    *("CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "README.ja.md", "README.md", "SECURITY.md"),
    *("constraints.txt", "pyproject.toml", "run.py"),
    *("benchmarks", "comfyui", "dataset", "demo", "docs", "tests", "utils", "wan"),
    *("wan_cache_latents.py", "wan_cache_text_encoder_outputs.py", "wan_dataset.py"),
    *("wan_generate_video.py", "wan_lora.py", "wan_train_network.py"),
}

# module -> package, where the names differ; None for those on no package index
PACKAGES = {
    "PIL": "pillow",
    "_typeshed": None,  # type checkers bring it
    "comfy": None,  # ComfyUI brings it, and the three below
    "folder_paths": None,
    "node_helpers": None,
    "nodes": None,
    "cv2": "opencv-python-headless",
    "flash_attn_interface": None,  # FlashAttention 3, built from its sources
    "lycoris": "lycoris-lora",
    "skimage": "scikit-image",
    "tomllib": None,  # of the standard library from Python 3.11 on
    "triton": "torch",  # comes with its builds for GPUs, see pyproject.toml
    "typing_extensions": None,  # imported for type checkers alone, which bring it
    "yaml": "pyyaml",
}


def tracked() -> list[str]:
    if not (ROOT / ".git").exists():
        pytest.skip("git does not know what belongs to a copy without .git")
    command = ["git", "-c", f"safe.directory={ROOT}", "ls-files", "-z"]
    listing = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, encoding="utf-8").stdout
    return [name for name in listing.split("\0") if name]


def normal(package: str) -> str:
    """The name alone, as package indexes compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", package)[0]).lower()


def imported(path: Path) -> set[str]:
    """The top-level modules of all absolute imports, those inside functions too."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.level == 0}
    return {name.partition(".")[0] for name in names}


def test_nothing_lies_in_the_root_but_what_is_listed():
    assert {name.partition("/")[0] for name in tracked()} == IN_THE_ROOT


def test_every_imported_package_is_declared():
    own = {name.removesuffix(".py") for name in IN_THE_ROOT}
    for path in (ROOT / name for name in tracked() if name.endswith(".py")):
        in_tests = path.relative_to(ROOT).parts[0] in ("tests", "demo", "benchmarks")
        extras = {name: list_ for name, list_ in PROJECT["optional-dependencies"].items() if in_tests or name != "test"}
        declared = {normal(name) for name in sum(extras.values(), PROJECT["dependencies"])}
        packages = {PACKAGES.get(name, name) for name in imported(path) - own - sys.stdlib_module_names}
        assert {normal(name) for name in packages if name} <= declared, path


def test_the_newest_release_of_the_changelog_is_this_version():
    releases = re.findall(r"^## \[(\d.*?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert releases[0] == wan.__version__


def test_ci_runs_what_the_readme_says_on_every_python_that_is_supported():
    workflow = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text(encoding="utf-8"))
    job = workflow["jobs"]["test"]
    assert [step["run"] for step in job["steps"] if "run" in step] == ["python run.py test"]
    matrix = job["strategy"]["matrix"]
    assert "ubuntu-latest" in matrix["os"] and "windows-latest" in [row["os"] for row in matrix["include"]]
    low, high = map(int, re.fullmatch(r">=3\.(\d+),<3\.(\d+)", PROJECT["requires-python"]).groups())
    assert matrix["python"] == [f"3.{minor}" for minor in range(low, high)]


def test_whoever_reports_a_problem_is_asked_for_what_it_takes():
    form = yaml.safe_load((ROOT / ".github/ISSUE_TEMPLATE/problem.yml").read_text(encoding="utf-8"))
    required = [field["id"] for field in form["body"] if field["validations"]["required"]]
    assert {"command", "explain", "versions", "log"} <= set(required)


@pytest.mark.parametrize("name", [".pre-commit-config.yaml", "CITATION.cff", ".github/ISSUE_TEMPLATE/wish.yml"])
def test_files_that_other_programs_read_are_yaml(name):
    assert isinstance(yaml.safe_load((ROOT / name).read_text(encoding="utf-8")), dict)


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"])
def test_links_of_the_pages_in_the_root_lead_somewhere(name):
    for link in re.findall(r"\]\((?!https:)([^)#]+)", (ROOT / name).read_text(encoding="utf-8")):
        assert (ROOT / link).is_file(), link
