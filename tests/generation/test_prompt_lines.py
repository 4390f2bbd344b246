"""Prompt lines and files."""

import json

import pytest

from utils import cli
from utils.errors import ConfigError
from wan.generation import options
from wan.generation.options import PromptConfig
from wan.generation.prompt import FLAGS, Prompt, hint_where_cut
from wan.generation.prompt_lines import GENERATION, TRAINING, Dialect, parse_line, read_file


def line(text: str, dialect: Dialect = TRAINING) -> Prompt:
    return parse_line(text, "here", dialect)


def test_the_documented_line_is_read_and_the_last_of_a_repeated_option_wins():
    prompt = line(
        "The girl wears a school uniform. --i s.png --ci s.png --of target_index=1,control_index=0 "
        "--d 1111 --f 1 --s 10 --fs 7 --d 1234 --w 384 --h 576"
    )
    assert prompt == Prompt(
        prompt="The girl wears a school uniform.",
        image_path="s.png",
        control_image_path=("s.png",),
        one_frame="target_index=1,control_index=0",
        seed=1234,
        frame_count=1,
        sample_steps=10,
        discrete_flow_shift=7.0,
        width=384,
        height=576,
        place="here",
    )


@pytest.mark.parametrize("blank", ["\t", "\u3000", "\u00a0", " \t "])
def test_any_blank_stands_before_and_after_an_option(blank):
    prompt = line(f"猫{blank}と犬{blank}--w{blank}384{blank}--ci{blank}my start.png{blank}--n{blank}--d{blank}7")
    assert (prompt.prompt, prompt.width, prompt.seed) == (f"猫{blank}と犬", 384, 7)
    assert (prompt.control_image_path, prompt.negative_prompt) == (("my start.png",), "")


def test_control_images_collect_and_paths_keep_their_blanks():
    prompt = line("a --ci my start.png --ci end.png --ei end.png")
    assert prompt.control_image_path == ("my start.png", "end.png") and prompt.end_image_path == "end.png"
    masks = line("text --ci a.png --cim a_mask.png --ci b.png --cim b_mask.png").control_image_mask_path
    assert masks == ("a_mask.png", "b_mask.png")


@pytest.mark.parametrize("text", ["I see a cat", "n a cat", "w 512", "a cat -- sitting", "well-known --w 512"])
def test_the_prompt_text_is_never_read_as_an_option(text):
    assert line(text).prompt == text.split(" --w")[0]


@pytest.mark.parametrize("sign", ["\u2028", "\u2029", "\x85", "\f", "\v", "\x1c"])
def test_lines_of_a_file_end_at_line_breaks_alone(tmp_path, sign):
    path = tmp_path / "prompts.txt"
    path.write_bytes(f"a{sign}cat --w 64\r\nb\rc\n".encode())
    assert [prompt.prompt for prompt in read_file(path, "--from_file", GENERATION)] == [f"a{sign}cat", "b", "c"]


def test_a_line_may_hold_options_only_and_an_empty_negative_prompt():
    prompt = line("--n --w 64")
    assert (prompt.prompt, prompt.negative_prompt, prompt.width) == ("", "", 64)


@pytest.mark.parametrize("option", [option for option in FLAGS.values() if option.letters], ids=lambda o: o.key)
def test_flag_line_toml_and_json_give_the_same_value(option, tmp_path):
    text = {int: "32", float: "1.5", str: "a b"}[option.kind]
    value = option.kind(text)
    (tmp_path / "p.toml").write_text(f"[prompt]\n{option.key} = {value!r}\n", encoding="utf-8")
    (tmp_path / "p.json").write_text(json.dumps([{option.key: value}]), encoding="utf-8")
    given = [line(f"--{option.letters} {text}")]
    given += [prompt for file in ("p.toml", "p.json") for prompt in read_file(tmp_path / file, "--from_file", TRAINING)]
    parser = cli.Parser()
    cli.add_fields(parser, PromptConfig)
    prompt = () if option.key == "prompt" else ("--prompt", "")
    given.append(cli.build(PromptConfig, parser.parse_args([*prompt, f"--{option.flag}", text])).base)
    assert {getattr(prompt, option.key) for prompt in given} == {(value,) if option.is_list else value}


def test_g_is_the_guidance_scale_in_generation_only():
    assert line("a --g 3", GENERATION).cfg_scale == 3.0
    assert line("a --g 3").cfg_scale is None
    assert line("a --l 4 --g 3", GENERATION).cfg_scale == 3.0


def test_a_negative_seed_means_a_random_one_in_training():
    assert line("a --d -1").seed is None
    assert line("a --d -1", GENERATION).seed == -1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a --x 3", ["here", "--x"]),
        ("a --w", ["--w has no value"]),
        ("a --w ten", ["--w ten", "whole number"]),
        ("a --l high", ["--l high", "number"]),
        ("a --s 0", ["sample_steps = 0"]),
        ("a --w 8", ["width = 8"]),
        ("a --cn video.mp4", ["--cn", "Fun-Control"]),
        ("a --cim", ["--cim has no value"]),
    ],
)
def test_a_wrong_option_is_refused_with_its_place(text, words):
    with pytest.raises(ConfigError) as caught:
        line(text)
    assert all(word in str(caught.value) for word in words), caught.value


def test_an_open_value_is_taken_from_the_command_line():
    base = Prompt(width=512, height=512, control_image_path=("a.png",), prompt="base")
    merged = line("text --w 64 --ci b.png").over(base)
    assert (merged.prompt, merged.width, merged.height) == ("text", 64, 512)
    assert merged.control_image_path == ("b.png",) and merged.place == "here"


def test_text_toml_and_json_files_give_the_same_prompts(tmp_path):
    (tmp_path / "p.txt").write_text(
        "# comment\n\n  # indented comment\na --w 64 --ci c.png\nb --w 32\n", encoding="utf-8"
    )
    (tmp_path / "p.toml").write_text(
        '[prompt]\nwidth = 64\n[[prompt.subset]]\nprompt = "a"\ncontrol_image_path = "c.png"\n'
        '[[prompt.subset]]\nprompt = "b"\nwidth = 32\n',
        encoding="utf-8",
    )
    (tmp_path / "p.json").write_text(
        json.dumps([{"prompt": "a", "width": 64, "control_image_path": ["c.png"]}, "b --w 32"]), encoding="utf-8"
    )
    for name in ("p.txt", "p.toml", "p.json"):
        prompts = read_file(tmp_path / name, "--sample_prompts", TRAINING)
        assert [(p.prompt, p.width, p.control_image_path) for p in prompts] == [("a", 64, ("c.png",)), ("b", 32, None)]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("p.txt", "# nothing\n", ["holds no prompt"]),
        ("p.txt", "good\nbad --x 1\n", ["p.txt:2", "--x"]),
        ("p.csv", "a\n", [".csv", ".toml"]),
        ("p.json", "{", ["p.json:1"]),
        ("p.json", "{}", ["list"]),
        ("p.json", "[3]", ["p.json[0]"]),
        ("p.json", '[{"promt": "a"}]', ["promt", "did you mean 'prompt'"]),
        ("p.json", '[{"width": "64"}]', ["width = '64'"]),
        ("p.json", '[{"control_image_path": [1]}]', ["control_image_path"]),
        ("p.toml", "[prompt\n", ["p.toml"]),
        ("p.toml", "width = 3\n", ["[prompt]"]),
        ("p.toml", "[prompt]\nsubset = 3\n", ["[[prompt.subset]]"]),
        ("p.toml", "[prompt]\nsubset = [3]\n", ["prompt.subset[0]", "is a int"]),
    ],
)
def test_a_wrong_file_is_refused_with_its_place(tmp_path, name, content, words):
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        read_file(tmp_path / name, "--sample_prompts", TRAINING)
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_missing_or_undecodable_file_is_refused(tmp_path):
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    for name, word in (("none.txt", "does not exist"), ("latin.txt", "UTF-8")):
        with pytest.raises(ConfigError, match=word):
            read_file(tmp_path / name, "--from_file", GENERATION)


def test_comments_among_typed_lines_are_no_prompts(monkeypatch):
    monkeypatch.setattr(options, "typed_lines", lambda *_: iter(["# a cat", "  #", "a dog"]))
    seen = []
    monkeypatch.setattr(options, "parse_line", lambda text, *_: seen.append(text) or Prompt(prompt=text))
    monkeypatch.setattr(options.SweepConfig, "cells", lambda *_: [])
    list(PromptConfig(interactive=True).typed(None, None, None, None))
    assert seen == ["a dog"]


def test_a_command_line_that_a_shell_has_cut_at_a_semicolon_is_told_from_others():
    cut = ["--one_frame_inference", "target_index=1,control_index=0"], ["--one_frame_inference=control_index=0"]
    assert all("put quotes around it" in hint_where_cut(["--prompt", "a", *words]) for words in cut)
    whole = "control_index=0,target_index=1", "target_index=1,control_index=0;2", "target_index=1", ""
    assert not any(hint_where_cut(["--one_frame_inference", text]) for text in whole)
    assert not hint_where_cut([]) and not hint_where_cut([*cut[0], "--save_path", "out"])


def test_an_option_that_a_line_gives_twice_is_named(caplog):
    assert line("a --d 7 --d 7 --ci a --ci b").seed == 7 and not caplog.text
    line("a --d 7 --d 8")
    assert "here: --d is given twice: 8 counts, 7 does not" in caplog.text
