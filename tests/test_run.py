"""run.py: what it installs, when it does so, and that it passes on arguments, exit codes and Ctrl-C."""

import ast
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from utils.parsing import parse_toml

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
on_posix = pytest.mark.skipif(os.name == "nt", reason="signals are sent the POSIX way")


def load(folder: Path):
    """run.py of `folder` as a module."""
    specification = importlib.util.spec_from_file_location("run_under_test", folder / "run.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def project(tmp_path):
    """A copy of run.py, pyproject.toml and constraints.txt, with modules that stand for ruff and pytest."""
    for name in ("run.py", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("ruff", "mypy"):
        text = f"import sys; print('{name}', *sys.argv[1:], flush=True)"
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
    (tmp_path / "pytest.py").write_text(
        "import sys; print('pytest', *sys.argv[1:], flush=True); sys.exit(5)", encoding="utf-8"
    )
    return tmp_path


@pytest.fixture
def installed(project):
    """`project` with an environment whose stamp says that everything is there."""
    run = load(project)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", run.VENV], check=True)
    run.execute = lambda *command: 0
    assert run.prepare(PYPROJECT) == 0
    return project


def call(project, *arguments, **options):
    return subprocess.run(
        [sys.executable, project / "run.py", *arguments], capture_output=True, text=True, timeout=60, **options
    )


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def test_the_requirements_are_those_a_toml_reader_finds():
    project = parse_toml(PYPROJECT)["project"]
    assert load(ROOT).requirements(PYPROJECT) == project["dependencies"] + project["optional-dependencies"]["test"]


def test_the_supported_versions_are_those_of_requires_python():
    assert list(load(ROOT).supported_minors(PYPROJECT)) == [10, 11, 12]


def test_every_requirement_is_pinned_to_one_version():
    assert pins()["torch"] == "2.13.0"
    assert {re.split(r"[^\w-]", name)[0] for name in load(ROOT).requirements(PYPROJECT)} <= pins().keys()


def test_run_can_be_read_by_old_interpreters_so_that_they_reach_the_message():
    ast.parse((ROOT / "run.py").read_text(encoding="utf-8"), feature_version=(3, 6))


def test_run_imports_the_standard_library_only():
    tree = ast.parse((ROOT / "run.py").read_text(encoding="utf-8"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert names <= sys.stdlib_module_names


def test_an_interpreter_outside_requires_python_is_named_in_one_line(project):
    text = re.sub(r"requires-python = .*", 'requires-python = ">=3.97,<3.99"', PYPROJECT)
    (project / "pyproject.toml").write_text(text, encoding="utf-8")
    result = call(project, "test")
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    assert result.returncode == 1 and not (project / ".venv").exists()
    assert result.stderr.splitlines() == [
        f"Python {version} is not supported; call run.py with 3.97 to 3.98, e.g. python3.98 run.py test"
    ]


@pytest.mark.parametrize(
    ("arguments", "code"),
    [([], 2), (["tset"], 2), (["--help"], 0), (["demo", "--help"], 0), (["weights", "-h"], 0)],
)
def test_without_a_known_command_and_for_help_the_usage_is_shown_and_nothing_installed(project, arguments, code):
    result = call(project, *arguments)
    shown = result.stderr if code else result.stdout
    assert result.returncode == code and "python run.py demo" in shown
    assert not (project / ".venv").exists()


def test_the_second_call_starts_within_two_seconds_and_passes_arguments_and_exit_code(installed):
    begin = time.perf_counter()
    result = call(installed, "test", "-k", "two words", "--", "x")
    assert time.perf_counter() - begin < 2
    assert result.stdout.splitlines() == ["ruff check", "ruff format --check", "mypy", "pytest -k two words -- x"]
    assert result.returncode == 5


@pytest.mark.parametrize("checker", ["ruff", "mypy"])
def test_tests_run_and_the_call_fails_when_only_a_checker_fails(installed, checker):
    (installed / f"{checker}.py").write_text("import sys; sys.exit('format' not in sys.argv)", encoding="utf-8")
    (installed / "pytest.py").write_text("print('ran')", encoding="utf-8")
    result = call(installed, "test")
    assert (result.returncode, result.stdout.splitlines()[-1]) == (1, "ran")


def record(run, *codes):
    """Replace the programs that `run` calls by a list of their command lines; they return `codes`, then 0."""
    commands, codes = [], list(codes)

    def execute(*command):
        commands.append(" ".join(map(str, command)))
        code = codes.pop(0) if codes else 0
        if code is KeyboardInterrupt:
            raise KeyboardInterrupt
        return code

    run.execute = execute
    return commands


def touch_python(run):
    run.PYTHON.parent.mkdir(parents=True, exist_ok=True)
    run.PYTHON.touch()


def test_the_first_call_makes_an_environment_and_installs_under_the_constraints(project):
    run = load(project)
    commands = record(run)
    assert run.prepare(PYPROJECT) == 0
    assert [" ".join(command.split()[1:3]) for command in commands] == ["-m venv", "-m pip"]
    assert f"-c {project / 'constraints.txt'} {' '.join(run.requirements(PYPROJECT))}" in commands[1]
    assert run.STAMP.exists() and not run.UNFINISHED.exists()


@pytest.mark.parametrize("codes", [(KeyboardInterrupt,), (0, KeyboardInterrupt), (0, 1), (1,)])
def test_what_an_interrupted_or_failed_call_left_is_made_anew(project, codes):
    run = load(project)
    record(run, *codes)
    if KeyboardInterrupt in codes:
        with pytest.raises(KeyboardInterrupt):
            run.prepare(PYPROJECT)
    else:
        assert run.prepare(PYPROJECT) == 1
    touch_python(run)
    rest = run.VENV / "lib" / "half-installed.py"
    rest.parent.mkdir()
    rest.touch()
    commands = record(run)
    assert run.prepare(PYPROJECT) == 0
    assert [" ".join(command.split()[1:3]) for command in commands] == ["-m venv", "-m pip"]
    assert not rest.exists() and not run.UNFINISHED.exists()


def test_an_environment_that_is_not_ours_is_updated_and_nothing_in_it_deleted(project):
    run = load(project)
    touch_python(run)
    (run.VENV / "theirs").touch()
    commands = record(run)
    assert run.prepare(PYPROJECT) == 0
    assert len(commands) == 2 and all("-m pip" in command for command in commands)
    assert (run.VENV / "theirs").exists()


def test_an_environment_without_a_working_pip_is_made_anew(project):
    run = load(project)
    touch_python(run)
    commands = record(run, 1)
    assert run.prepare(PYPROJECT) == 0
    assert "-m venv" in commands[1] and not run.PYTHON.exists()


@pytest.mark.parametrize(
    ("name", "old", "new", "installs"),
    [
        ("pyproject.toml", '"einops",', '"einops>0",', True),
        ("constraints.txt", "einops==", "einops!=", True),
        ("pyproject.toml", "line-length = 120", "line-length = 100", False),
    ],
)
def test_other_requirements_are_installed_and_other_settings_change_nothing(installed, name, old, new, installs):
    path = installed / name
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")
    run = load(installed)
    commands = record(run)
    assert run.prepare((installed / "pyproject.toml").read_text(encoding="utf-8")) == 0
    assert any("-m pip install" in command for command in commands) == installs


@pytest.mark.usefixtures("heeded_signals")
@on_posix
def test_ctrl_c_lets_the_child_finish_and_ends_with_130(installed):
    (installed / "pytest.py").write_text(
        "import time\n"
        "try:\n    print('ready', flush=True)\n    time.sleep(30)\n"
        "except KeyboardInterrupt:\n    time.sleep(0.5)\n    print('tidied up', flush=True)\n",
        encoding="utf-8",
    )
    command = [sys.executable, installed / "run.py", "test"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while process.stdout.readline() != "ready\n":
        pass
    os.killpg(process.pid, signal.SIGINT)
    output, errors = process.communicate(timeout=20)
    assert (process.returncode, output, errors) == (130, "tidied up\n", "stopped\n")


@on_posix
def test_a_child_that_is_killed_gives_a_shells_exit_code(installed):
    (installed / "pytest.py").write_text("import os; os.kill(os.getpid(), 9)", encoding="utf-8")
    assert call(installed, "test").returncode == 137
