"""Dataclasses as flags: what is declared is what is parsed, and every mistake is one line and exit code 1."""

import errno
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from utils import cli
from utils.errors import ConfigError
from utils.files import fingerprint, require_file, require_writable_dir, written_whole
from utils.options import Section, option
from utils.parsing import parse_json
from utils.text import one_line, some


@dataclass(frozen=True)
class Example(Section):
    """some settings"""

    name: str = option(help="required")
    count: int = option(3, help="a number, 100% sure", minimum=0, rule="must be 0 or above")
    rate: float | None = option(None, help="a number or nothing")
    files: tuple[Path, ...] = option((), help="any number")
    switch: bool = option(False, help="on or off")
    kind: str = option("a", help="one of two", choices=["a", "b"])
    derived: int = 0


def parse(*argv: str) -> Example:
    parser = cli.Parser()
    cli.add_fields(parser, Example)
    cli.refuse(parser, {"--old": "is gone"})
    cli.ignore(parser, {"--noop": "nothing to do"})
    return cli.build(Example, parser.parse_args(argv))


def test_values_get_the_types_of_their_fields():
    section = parse("--name", "x", "--rate", "0.5", "--files", "a", "b", "--switch", "--count", "4", "--kind", "b")
    assert section == Example("x", 4, 0.5, (Path("a"), Path("b")), True, "b")


def test_unset_flags_keep_the_defaults_and_help_shows_them():
    assert parse("--name", "x") == Example("x")
    parser = cli.Parser()
    cli.add_fields(parser, Example)
    text = parser.format_help()
    assert "some settings" in text and "100% sure (default: 3)" in text and "--derived" not in text


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], ["--name"]),
        (["--name"], ["--name", "expected one argument"]),
        (["--name", "x", "--cuont", "3"], ["--cuont", "did you mean '--count'"]),
        (["--name", "x", "--count", "three"], ["--count", "three"]),
        (["--name", "x", "--kind", "c"], ["--kind", "'c'"]),
        (["--name", "x", "--count", "-1"], ["--count -1"]),
        (["--name", "x", "--old", "3"], ["--old: is gone"]),
    ],
)
def test_every_mistake_is_a_config_error_that_names_the_flag(argv, words):
    with pytest.raises(ConfigError) as caught:
        parse(*argv)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize("rate", ["-5e-1", "-.5", "-1E+3", "-2", "-0.25"])
def test_a_negative_number_may_have_an_exponent(rate):
    assert parse("--name", "x", "--rate", rate).rate == float(rate)


def test_a_flag_that_is_given_twice_is_told(caplog):
    with pytest.raises(ConfigError, match=r"--files is given twice; write all values after one: --files a b c$"):
        parse("--name", "x", "--files", "a", "--files", "b", "c")
    assert parse("--name", "x", "--count", "4", "--name=x", "--count=5") == Example("x", 5)
    assert [record.getMessage() for record in caplog.records] == ["--count is given twice: 5 counts, 4 does not"]


def test_a_flag_of_a_command_that_is_given_twice_is_told():
    parser = cli.Parser()
    cli.add_fields(parser.add_subparsers().add_parser("go"), Example)
    with pytest.raises(ConfigError, match="--files is given twice"):
        parser.parse_args(["go", "--name", "x", "--files", "a", "--files", "b"])


def test_an_ignored_flag_is_mentioned_and_has_no_effect(caplog):
    assert parse("--name", "x", "--noop", "7") == Example("x")
    assert "--noop has no effect: nothing to do" in caplog.text


def parse_file(folder: Path, text: str, *argv: str) -> Example:
    (folder / "run.toml").write_text(text, encoding="utf-8")
    parser = cli.Parser()
    cli.add_fields(parser, Example)
    parser.read_options_from("--config_file")
    return cli.build(Example, parser.parse_args([*argv, "--config_file", str(folder / "run")]))


def test_a_config_file_gives_options_and_the_command_line_goes_over_them(tmp_path):
    text = 'name = "x"\nswitch = true\n[any_table]\ncount = 4\nrate = 0.5\nfiles = ["a", "b"]\n'
    assert parse_file(tmp_path, text) == Example("x", 4, 0.5, (Path("a"), Path("b")), True)
    assert parse_file(tmp_path, text + "[other]\nkind = 'b'\n", "--count", "7", "--kind=a").count == 7
    assert parse_file(tmp_path, 'name = "x"\nswitch = false\n') == Example("x")
    assert parse_file(tmp_path, text, "--files", "c").files == (Path("c"),)


def test_settings_written_as_toml_are_read_back_as_they_were(tmp_path):
    section = Example("a b", -0, -0.25, (Path("c d/e"), Path("f")), True, "b")
    assert parse_file(tmp_path, cli.to_toml(section)) == section


@pytest.mark.parametrize("name", [r"C:\Users\x7", "rate 1\x1f", 'say "hi", you', "猫 # [a]", "two\nlines", "\\"])
def test_settings_with_difficult_letters_are_read_back_too(tmp_path, name):
    section = Example(name, files=(Path(name.replace("\\", "/")), Path("b, c=['d']")))
    assert parse_file(tmp_path, cli.to_toml(section)) == section


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("cuont = 3", ["cuont", "did you mean 'count'"]),
        ('count = "three"', ["run.toml", "--count", "three"]),
        ('kind = "c"', ["run.toml", "--kind", "'c'"]),
        ("switch = 1", ["run.toml", "switch = 1", "true or false"]),
        ("count = true", ["count = True", "not a switch"]),
        ("count = [1]", ["count = [1]", "one value"]),
        ("count = ", ["run.toml", "line 1"]),
        ("count = 4", ["--name"]),
        ('config_file = "other"', ["run.toml", "unknown key 'config_file'"]),
        ("help = true", ["run.toml: unknown key 'help'"]),
    ],
)
def test_a_mistake_in_a_config_file_is_told_with_its_place(tmp_path, text, words):
    with pytest.raises(ConfigError) as caught:
        parse_file(tmp_path, text)
    assert all(word in str(caught.value) for word in words), caught.value


def test_run_prints_one_line_and_exits_with_1():
    code = "from utils import cli, errors\ndef main(): raise errors.ConfigError('a\\nb')\ncli.run(main)"
    root = Path(__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr, result.stdout) == (1, "error: a b\n", "")


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), written_whole(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with written_whole(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_a_fingerprint_follows_the_content(tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    first.write_bytes(b"x" * 1000)
    second.write_bytes(b"x" * 1000)
    assert fingerprint(first) == fingerprint(second)
    second.write_bytes(b"x" * 999 + b"y")
    assert fingerprint(first) != fingerprint(second)


def test_an_unwritable_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--output_dir .*cannot write"):
        require_writable_dir(tmp_path / "file" / "sub", "--output_dir")


def test_a_name_that_no_file_can_have_is_refused():
    for name in ("no\0where.png", "no\0where/cat.png"):
        with pytest.raises(ConfigError, match=r"--image .*: holds a zero byte"):
            require_file(name, "--image")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 100_000, "brackets"),
        ("9" * 5000, "digits"),
        ('"\\ud800"', "half a character"),
        ("[1,", "Expecting value"),
        ('{"a": 1, "b": {"a": 2, "a": 2}}', "'a' is given twice"),
    ],
)
def test_json_that_python_can_not_take_is_told_like_json_that_is_none(text, words):
    with pytest.raises(json.JSONDecodeError, match=words):
        parse_json(text)
    assert parse_json('["\\ud83d\\udc08"]') == ["🐈"]


def test_a_message_is_shown_without_control_characters_and_its_middle_when_it_is_endless():
    assert one_line("a\x1b[2J\nb\u3000猫 \udc80\n") == "a [2J b 猫 \udc80"
    assert one_line("x" * 10**6) == "x" * 147 + "..."
    long = one_line("see " + "x" * 10**6 + " and mend it", 2000, keep_end=True)
    assert len(long) == 2000 and long.startswith("see x") and long.endswith("x and mend it")


def test_the_first_names_of_a_list_stand_for_the_rest():
    assert some(["a", "b", "c"]) == "a, b, c"
    assert some("abcde") == "a, b, c and 2 more" and some("abcde", 4, ", ...") == "a, b, c, d, ..."


def test_a_file_that_the_system_refuses_is_one_line(capsys):
    def main():
        raise PermissionError(13, "Permission denied", "some/file")

    with pytest.raises(SystemExit):
        cli.run(main)
    assert capsys.readouterr().err.startswith("error: some/file: Permission denied; check")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.EMFILE, "Too many open files"), "too many open files"),
        (RuntimeError("unable to open shared memory object: Too many open files (24)"), "ulimit -n"),
        (MemoryError(), "memory of the computer"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "memory of the computer"),
    ],
)
def test_want_of_files_and_memory_is_one_line(capsys, error, words):
    def main():
        raise error

    with pytest.raises(SystemExit) as exit_:
        cli.run(main)
    shown = capsys.readouterr().err
    assert exit_.value.code == 1 and shown.startswith("error: ") and words in shown and shown.count("\n") == 1


def test_what_is_logged_can_not_steer_a_terminal():
    code = (
        "import logging; from utils import cli; cli.run(lambda: logging.warning('%s', 'a\\x1b]0;b\\x07\\x9b2Jc\\nd'))"
    )
    root = Path(__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "a ]0;b  2Jc\nd\n")


@pytest.mark.skipif(sys.platform == "win32", reason="arguments are Unicode there")
def test_an_ascii_locale_does_not_keep_other_letters_out(tmp_path):
    (tmp_path / "猫.txt").write_text("here")
    code = (
        "import sys; from pathlib import Path; from utils import cli\n"
        "cli.run(lambda: print(ascii(sys.argv[1]), Path(sys.argv[2]).read_text()))"
    )
    ascii_only = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    result = subprocess.run(
        [sys.executable, "-c", code, "夕方の猫", str(tmp_path / "猫.txt")],
        cwd=Path(__file__).parents[2],
        env=ascii_only,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stdout) == (0, ascii("夕方の猫") + " here\n"), result.stderr


def test_other_errors_keep_their_traceback():
    def main():
        raise RuntimeError("a defect")

    with pytest.raises(RuntimeError, match="a defect"):
        cli.run(main)


@pytest.mark.skipif(sys.platform == "win32", reason="pipes of POSIX")
def test_a_reader_that_goes_away_is_no_error():
    code = "from utils import cli\ncli.run(lambda: print('line\\n' * 100_000))"
    program = subprocess.Popen(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert program.stdout.readline() == b"line\n"
    program.stdout.close()
    assert program.stderr.read() == b"" and program.wait() == 0


def test_options_of_a_file_are_typed_and_checked_like_flags():
    parser = cli.Parser()
    cli.add_fields(parser, Example)
    found = parser.typed({"name": "--x", "files": ["-a", "b"], "switch": True, "rate": 2}, "here")
    assert vars(found) == {"name": "--x", "files": (Path("-a"), Path("b")), "switch": True, "rate": 2.0}
    args = parser.parse_args(["--rate", "3", "--name", "y"], found)
    assert cli.build(Example, args) == Example("y", rate=3.0, files=(Path("-a"), Path("b")), switch=True)


@dataclass(frozen=True)
class Bounded(Section):
    """numbers"""

    steps: int | None = option(None, help="some", minimum=1, maximum=1000)
    speed: float = option(1.0, help="some", above=0, rule="must be above 0; try 1e-4")
    dropout: float = option(0.0, help="some", minimum=0, below=1)
    size: tuple[int, ...] = option((), help="some", minimum=16)
    mode: str = option("none", help="some", needs="--size W H, e.g. 16 16")
    fast: bool = option(False, help="some", needs="--steps")
    free: tuple[float, ...] = option((), help="some")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, "--steps 0: must be 1 to 1000"),
        ({"steps": 1001}, "--steps 1001: must be 1 to 1000"),
        ({"speed": 0.0}, "--speed 0.0: must be above 0; try 1e-4"),
        ({"speed": float("nan")}, "--speed nan: must be above 0; try 1e-4"),
        ({"speed": float("inf")}, "--speed inf: must be a finite number"),
        ({"free": (1.0, float("nan"))}, "--free 1.0 nan: must be a finite number"),
        ({"dropout": 1.0}, "--dropout 1.0: must be at least 0 and below 1"),
        ({"size": (16, 15)}, "--size 16 15: must be at least 16"),
        ({"mode": "x"}, "--mode x needs --size W H, e.g. 16 16"),
        ({"fast": True}, "--fast needs --steps"),
    ],
)
def test_values_beyond_the_bounds_of_an_option_are_refused(values, message):
    with pytest.raises(ConfigError) as caught:
        Bounded(**values)
    assert str(caught.value) == message


def test_bounds_include_their_ends_and_needs_are_met_by_any_value():
    for steps in (1, 1000):
        Bounded(steps=steps, dropout=0.0, speed=1e-9, size=(16, 16), mode="x", fast=True)


@dataclass(frozen=True)
class Inner:
    bounded: Bounded


@dataclass(frozen=True)
class Both:
    inner: Inner
    example: Example
    derived: int = 7


def test_a_group_is_filled_by_the_types_of_its_fields():
    parser = cli.Parser()
    cli.add_fields(parser, Both)
    group = cli.build_group(Both, parser.parse_args(["--steps", "5", "--name", "x", "--speed", "2"]))
    assert group == Both(Inner(Bounded(5, 2.0)), Example("x"))
    titles = [line for line in parser.format_help().splitlines() if line in ("numbers:", "some settings:")]
    assert titles == ["numbers:", "some settings:"]
    assert cli.settings(group.inner) == {"steps": 5, "speed": 2.0, "dropout": 0.0, "mode": "none", "fast": False}
    assert [*cli.values(group)] == [
        "steps",
        "speed",
        "dropout",
        "size",
        "mode",
        "fast",
        "free",
        *cli.values(Example("x")),
    ]
