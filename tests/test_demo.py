"""The miniature family's files, what its models are shown, and how the demo judges."""

import json
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

import wan_cache_latents
import wan_cache_text_encoder_outputs
import wan_generate_video
import wan_train_network
from demo import edit, experiments, judge, miniature
from demo.edit import FULL, SHORT, Limits
from demo.judge import Score
from demo.lesson import Lesson, commands, load_picture, write_data, write_tests
from demo.muon import Muon, orthogonal
from demo.optimise import learning_rate, optimise
from demo.page import Row, sheet, write_page
from demo.pretrain import HELD_OUT_SEED, reconstruction_psnr
from demo.recordings import record, video_conditions
from demo.tasks import TASKS, collage, cut_out, cut_out_of_others, in_all_places
from demo.train_dit import count_padding_, embed_text, new_dit
from demo.train_vae import convolve_in_2d, decode, new_vae, normalise_and_activate, normalise_latents_, recoloured
from demo.world import LIGHTS, PLACES, sample_scene
from tests.helpers import official_video_condition
from wan.files.load import inspect_clip, inspect_dit, load_clip, load_dit, load_t5, load_vae
from wan.files.tokenizer import load_tokenizer
from wan.frames.layout import parse
from wan.generation.prompt_lines import GENERATION, parse_line
from wan.nets.conditioning import Conditioning
from wan.nets.context import pad_text
from wan.nets.t5 import encode_text
from wan.nets.vae import CausalConv3d, ChannelNorm

CPU = torch.device("cpu")
SCRIPTS = (wan_cache_latents, wan_cache_text_encoder_outputs, wan_train_network, wan_generate_video)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """Random weights in the sizes of the miniature, and the modules they came from."""
    folder = tmp_path_factory.mktemp("miniature")
    modules = {"vae": new_vae(), "t5": miniature.new_t5(generator()), "clip": miniature.new_clip(generator())}
    modules |= {kind: new_dit(kind, generator()) for kind in ("i2v", "flf2v")}
    for kind in ("i2v", "flf2v"):
        miniature.write_dit(folder, kind, modules[kind])
    miniature.write_vae(folder, modules["vae"])
    miniature.write_t5(folder, modules["t5"])
    miniature.write_clip(folder, modules["clip"])
    miniature.write_tokenizer(folder)
    return folder, modules


def test_the_loaders_of_the_scripts_read_back_every_weight(family):
    folder, modules = family
    loaders = {"vae": load_vae, "t5": load_t5, "clip": load_clip, "i2v": load_dit, "flf2v": load_dit}
    for kind, load in loaders.items():
        loaded = load(folder / miniature.FILES[kind], torch.float32, CPU).state_dict()
        written = modules[kind].state_dict()
        rounding = 2**-8 if kind in ("t5", "i2v", "flf2v") else 2**-10
        for name, tensor in loaded.items():
            assert_close(tensor, written[name].to(tensor), rtol=rounding, atol=1e-6)


def test_the_family_is_small_and_fits_together(family):
    folder, _ = family
    assert sum(path.stat().st_size for path in folder.rglob("*")) < 30e6
    for kind in ("i2v", "flf2v"):
        spec = inspect_dit(folder / miniature.FILES[kind])
        assert spec == miniature.dit_spec(kind) and spec.model_type == kind
        assert spec.image_dim == inspect_clip(folder / miniature.FILES["clip"])


def test_text_in_pretraining_is_embedded_as_in_the_scripts(family):
    folder, _ = family
    t5 = load_t5(folder / miniature.FILES["t5"], torch.float32, CPU)
    captions = ["she waves", "a girl with long red hair, on a beach. she jumps", ""]
    tokenizer = miniature.build_tokenizer()
    tokenizer.enable_padding(length=48)
    tokens = tokenizer.encode_batch(captions)
    ids, mask = (torch.tensor([getattr(one, name) for one in tokens]) for name in ("ids", "attention_mask"))
    expected = pad_text(encode_text(t5, load_tokenizer(folder / miniature.FILES["tokenizer"]), captions, CPU))
    assert_close(embed_text(t5, ids, mask), expected[:, :49], rtol=1e-4, atol=1e-4)
    assert not expected[:, 48:].any()


def test_the_words_of_the_world_are_those_that_the_shipped_family_has_learned():
    shipped = (miniature.FOLDER / miniature.FILES["tokenizer"] / "tokenizer.json").read_text(encoding="utf-8")
    assert json.loads(miniature.build_tokenizer().to_str()) == json.loads(shipped)


def test_the_untrained_models_tell_captions_and_pictures_apart(family):
    _, modules = family
    ids = miniature.build_tokenizer().encode("the shirt turns red").ids
    other = miniature.build_tokenizer().encode("the shirt turns blue").ids
    with torch.no_grad():
        one, two = (modules["t5"](input_ids=torch.tensor([tokens])).last_hidden_state for tokens in (ids, other))
    assert float((one - two)[0, 3].norm() / one[0, 3].norm()) > 0.3


def test_normalising_latents_gives_them_mean_0_and_spread_1_and_changes_no_picture():
    torch.manual_seed(0)
    vae = new_vae().requires_grad_(False)
    for layer in (vae.conv1, vae.conv2):
        layer.bias.normal_()
    pixels = torch.rand(2, 3, 5, 32, 32) * 2 - 1
    before = decode(vae, vae.conv1(vae.encoder(pixels))[:, :16])
    normalise_latents_(vae, vae.encode(pixels).transpose(0, 1).flatten(1))
    latents = vae.encode(pixels).transpose(0, 1).flatten(1)
    assert_close(latents.mean(1), torch.zeros(16), atol=1e-4, rtol=0)
    assert_close(latents.std(1), torch.ones(16), atol=1e-4, rtol=0)
    assert_close(vae.decode(vae.encode(pixels)), before.clamp(-1, 1), atol=1e-4, rtol=1e-4)


def test_a_new_vae_treats_the_frames_of_a_clip_as_stills_until_it_is_trained():
    torch.manual_seed(0)
    vae = new_vae().requires_grad_(False)
    still = torch.rand(1, 3, 1, 32, 32) * 2 - 1
    assert_close(vae.encode(still.repeat(1, 1, 5, 1, 1))[:, :, :1], vae.encode(still))
    assert vae.encode(still).std() > 0.05 and vae.decode(vae.encode(still)).std() > 0.05


@pytest.mark.parametrize(("frames", "limit"), [(1, 30.0), (5, 28.0)])
def test_the_vae_that_is_shipped_gives_held_out_pictures_back(frames, limit):
    vae = load_vae(miniature.FOLDER / miniature.FILES["vae"], torch.float32, CPU)
    held_out = record(24, HELD_OUT_SEED, CPU, held_out=True)
    errors = torch.cat([reconstruction_psnr(vae, part.frames[:, :frames]) for part in held_out])
    assert errors.mean() > limit


@pytest.mark.parametrize("with_last", [False, True])
def test_the_video_models_see_the_conditions_of_wans_training(with_last):
    torch.manual_seed(0)
    vae, videos = new_vae().requires_grad_(False), torch.rand(2, 3, 9, 32, 48) * 2 - 1
    expected = [official_video_condition(vae, video, with_last) for video in videos]
    assert_close(video_conditions(vae, videos, with_last), torch.stack(expected))


def test_the_condition_of_a_short_clip_is_the_beginning_of_that_of_a_long_one():
    torch.manual_seed(0)
    vae = new_vae().requires_grad_(False)
    for parameter in vae.parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))
    videos = torch.rand(1, 3, 9, 32, 32) * 2 - 1
    long, short = (video_conditions(vae, videos[:, :, :length], with_last=False) for length in (9, 5))
    assert_close(long[:, :, :2], short)


def test_recordings_hold_each_seed_once():
    sets = record(12, 40, CPU)
    assert sum(len(part.captions) for part in sets) == sum(len(part.frames) for part in sets) == 12
    assert sum(len(part.half().captions) for part in sets) in range(6, 10)


def test_the_learning_rate_rises_and_falls_to_almost_nothing():
    rates = [learning_rate(step, 100, 2.0, warmup=4) for step in range(100)]
    assert rates[0] == pytest.approx(0.5) and max(rates) == rates[3] and rates[-1] < 0.001
    assert rates[50] == pytest.approx(1.0)


def test_the_training_loop_finds_a_minimum(capsys):
    x, y = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(3, 2))
    target, other = torch.tensor([0.3, -0.2]), torch.tensor([[0.3, 0.1], [-0.2, 0.0], [0.1, 0.2]])

    def loss(_kind, aim, other_aim):
        return (x - aim).square().sum() + (y - other_aim).square().sum()

    optimise([x, y], 300, 0.05, lambda step: (step % 2, (target, other)), loss, "x", [y])
    assert_close(x.detach(), target, atol=0.01, rtol=0)
    assert_close(y.detach(), other, atol=0.02, rtol=0)
    assert "x: step 300" in capsys.readouterr().out


@pytest.mark.parametrize("shape", [(8, 8), (4, 12), (12, 4)])
def test_an_orthogonal_matrix_has_the_same_vectors_and_singular_values_near_1(shape):
    matrix = torch.randn(3, *shape, generator=generator())
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    values = (left.mT @ orthogonal(matrix).float() @ right.mT).diagonal(dim1=1, dim2=2)
    assert values.min() > 0.5 and values.max() < 1.3  # what the five iterations come to, as published


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has none")
def test_muon_is_torchs_muon():
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in ((6, 4), (4, 6), (6, 4))]
    theirs = [torch.nn.Parameter(matrix.detach().clone()) for matrix in ours]
    muon = Muon(ours, torch.tensor(0.02), weight_decay=0.1)
    expected = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for step in range(4):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn(one.shape, generator=torch.Generator().manual_seed(step))
            other.grad = one.grad.clone()
        muon.step()
        expected.step()
    for one, other in zip(ours, theirs, strict=True):
        assert_close(one, other, atol=2e-3, rtol=0)  # it iterates in bfloat16


def test_padding_that_counts_is_padding():
    dit = new_dit("i2v", generator())
    for parameter in dit.head.parameters():
        torch.nn.init.normal_(parameter, std=0.02, generator=generator())
    text = torch.randn(2, 57, miniature.TEXT_DIM, generator=generator())
    text[:, -1] = 0
    inputs = [torch.randn(2, channels, 2, 4, 4, generator=generator()) for channels in (16, 20)]
    image, indices = torch.randn(2, 257, miniature.CLIP_DIM, generator=generator()), torch.tensor([[0, 1]] * 2)
    arguments = (inputs[0], Conditioning(inputs[1], image), torch.tensor([300.0, 700.0]), text, indices)
    with torch.no_grad():
        expected = dit(*arguments)
        count_padding_(dit)
        assert_close(dit(*arguments), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("frames", "kernel"), [(1, (3, 3, 3)), (5, (3, 3, 3)), (4, (3, 1, 1)), (3, (1, 1, 1))])
def test_a_causal_convolution_in_2d_is_the_one_in_3d(frames, kernel):
    torch.manual_seed(0)
    layer = CausalConv3d(4, 6, kernel)
    x = torch.randn(2, 4, frames, 8, 8)
    assert_close(convolve_in_2d(layer, x), layer(x), atol=1e-5, rtol=1e-5)


def test_normalisation_and_activation_on_rows_are_those_of_the_vae():
    torch.manual_seed(0)
    norm, silu, x = ChannelNorm(16), torch.nn.SiLU(), torch.randn(2, 16, 3, 8, 8)
    norm.gamma.data.normal_()

    def on_rows(rows, gain):
        return silu(rows / rows.square().mean(dim=1, keepdim=True).sqrt() * gain)

    assert_close(normalise_and_activate(on_rows, norm, x), silu(norm(x)), atol=1e-5, rtol=1e-5)


def test_recolouring_swaps_and_dims_whole_channels():
    video = torch.tensor([-1.0, 0.0, 1.0]).view(1, 3, 1, 1, 1).expand(40, 3, 1, 2, 2)
    levels = recoloured(video, generator())[:, :, 0]
    assert_close(levels, levels[:, :, :1, :1].expand_as(levels))
    brightness = (levels[:, :, 0, 0] + 1) / 2
    assert bool((brightness.amax(1) >= 0.6).all()) and bool((brightness.amin(1) == 0).all())
    assert 5 < sum(row.argmax() != 2 for row in brightness) < 30  # about a third are in another order


@pytest.mark.parametrize("lesson", [*FULL, *SHORT], ids=lambda lesson: f"{lesson.name}-{lesson.pairs}")
def test_the_scripts_accept_the_commands_of_the_demo(lesson, tmp_path):
    known = {f"{script.__name__}.py": script.build_parser() for script in SCRIPTS}
    for script, *arguments in commands(lesson, tmp_path).values():
        known[script].parse_args(arguments)


def test_without_the_family_the_demo_says_what_is_missing_and_touches_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(edit, "OUT", tmp_path / "out")
    (tmp_path / "out").mkdir()
    assert edit.main(["--models", str(tmp_path / "nowhere")]) == 1
    assert "is missing" in capsys.readouterr().err and (tmp_path / "out").exists()


def test_the_short_demo_learns_with_the_shipped_family(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(edit, "OUT", tmp_path)
    assert edit.main(["--short"]) == 0
    assert capfd.readouterr().out.count("reached") == 4
    assert (tmp_path / "index.html").exists() and (tmp_path / "sheet.png").exists()


@pytest.mark.parametrize("lesson", FULL, ids=lambda lesson: lesson.name)
def test_the_data_of_a_lesson_is_what_the_scripts_read(lesson, tmp_path, monkeypatch):
    from dataset.config import read_config
    from dataset.sources import find_all_items

    monkeypatch.chdir(tmp_path)
    write_data(replace(lesson, pairs=3, tests=2), tmp_path)
    assert find_all_items(read_config(f"{lesson.name}/dataset.toml"))
    lines = (tmp_path / lesson.name / "prompts.txt").read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines):
        prompt = parse_line(line, "prompts.txt", GENERATION)
        assert prompt.seed == number and "school photo" in prompt.prompt
        assert parse(prompt.one_frame).control_indices == lesson.controls
        controls = [load_picture(tmp_path / path) for path in prompt.control_image_path]
        for control, expected in zip(controls, lesson.example(number, held_out=True).controls, strict=True):
            assert torch.equal(control, expected)
        assert (prompt.height, prompt.width) == tuple(controls[0].shape[1:])


@pytest.mark.parametrize("lesson", FULL, ids=lambda lesson: lesson.name)
def test_the_truth_scores_full_marks_and_the_unedited_picture_has_another_backdrop(lesson):
    for number in range(16):
        test = lesson.example(number, held_out=True)
        best = judge.score(test.plain, test.truth, test.truth)
        assert best.attribute and best.drift < 0.01 and best.psnr > 70
        assert not judge.score(test.plain, test.truth, test.plain).attribute


def test_a_change_outside_the_edit_is_drift_and_one_inside_is_not():
    test = FULL[0].example(0, held_out=True)
    outside, inside = test.truth.clone(), test.truth.clone()
    edited = (test.truth.int() - test.plain.int()).abs().amax(0) > 8
    outside[:, ~edited] = 255 - outside[:, ~edited]
    inside[:, edited] = 128
    assert judge.score(test.plain, test.truth, outside).drift > 0.005
    wrong = judge.score(test.plain, test.truth, inside)
    assert wrong.drift == 0 and not wrong.attribute and wrong.edited_psnr < 20


def test_psnr_of_a_known_error():
    one = torch.zeros(3, 4, 4, dtype=torch.uint8)
    assert judge.psnr(one, one + 51) == pytest.approx(13.9794, abs=1e-3)  # 20 log10(255 / 51)


@pytest.mark.parametrize(
    ("base", "lora", "missed"),
    [
        (Score(15, 10, 0.1, False), Score(24, 25, 0.02, True), set()),
        (Score(18, 10, 0.1, False), Score(24, 25, 0.02, True), {0}),
        (Score(15, 10, 0.1, False), Score(24, 23, 0.04, False), {1, 2, 3}),
    ],
)
def test_each_figure_has_its_limit(base, lora, missed):
    reached = [good for *_, good in edit.figures([(base, lora)], Limits())]
    assert {number for number, good in enumerate(reached) if not good} == missed


def test_the_page_shows_every_test_and_says_what_was_missed(tmp_path):
    test = FULL[0].example(0, held_out=True)
    rows = [Row([*test.controls, test.plain, test.truth, test.truth], "<note>")] * 3
    table = edit.figures([(Score(15, 10, 0.1, False), Score(24, 23, 0.02, True))], Limits())
    write_page(tmp_path, {"i2v": (rows, table)}, [FULL[0]], 60)
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert page.count("&lt;note&gt;") == 3 and page.count("missed") == 1 and 'src="i2v.png"' in page
    picture = load_picture(tmp_path / "sheet.png")
    assert torch.equal(picture, load_picture(tmp_path / "i2v.png"))
    one = sheet(rows[:1], ["start", "base model", "LoRA", "truth"])
    assert one.width == picture.shape[2] // 2


def test_the_trials_of_the_experiments_are_what_the_scripts_accept(tmp_path):
    known = {f"{script.__name__}.py": script.build_parser() for script in SCRIPTS}
    trials = [*experiments.index_trials(), *experiments.loss_trials(), *experiments.size_trials()]
    trials += [*experiments.reference_trials(), *experiments.mask_trials()]
    assert len({trial.label for trial in trials}) == len(trials)
    for trial in trials:
        for script, *arguments in commands(trial.lesson, tmp_path).values():
            known[script].parse_args(arguments)
    script, *arguments = commands(trials[0].lesson, tmp_path, "another/folder")["edited"]
    for flags in (*experiments.PRECISIONS.values(), ["--pin_controls"]):
        assert known[script].parse_args([*arguments, *flags]).from_file.as_posix() == "another/folder/prompts.txt"


def test_the_share_of_a_change_is_none_at_the_start_and_one_at_the_end():
    start, end = torch.zeros(3, 4, 4, dtype=torch.uint8), torch.zeros(3, 4, 4, dtype=torch.uint8)
    end[0, 1], half = 200, end.clone()
    half[0, 1], half[2, 3] = 100, 50  # what lies across the change does not count
    shares = [experiments.share_of_change(start, end, output) for output in (start, end, half)]
    assert shares == pytest.approx([0, 1, 0.5])


def test_noise_is_the_mean_difference_of_neighbours():
    stripes = torch.zeros(1, 4, 4, dtype=torch.uint8)
    stripes[:, ::2] = 10
    assert experiments.noise(stripes) == pytest.approx(5)  # 10 down, 0 across


def test_an_edge_runs_through_the_latent_pixels_that_are_partly_white_in_a_mask():
    masks = torch.zeros(2, 16, 24, dtype=torch.bool)
    masks[0, :8, :8] = True  # the whole of one
    masks[0, 3, 10] = masks[1, 8:, 16:20] = True
    expected = torch.zeros(16, 24, dtype=torch.bool)
    expected[:8, 8:16] = expected[8:, 16:] = True
    assert torch.equal(experiments.edges(masks), expected)


def test_a_table_shows_the_mean_and_the_spread_over_seeds(capsys):
    experiments.print_table(["a", "b"], [["x", experiments.spread([1.0, 2.0, 3.0], 1)]])
    assert capsys.readouterr().out == "\n| a | b |\n|---|---|\n| x | 2.0 ± 1.0 |\n"
    assert experiments.spread([1.5], 2) == "1.50"


def test_the_training_pairs_are_in_all_places_and_lights():
    scenes = [in_all_places(sample_scene(number), number) for number in range(32)]
    seen = {(scene.place.name, scene.light) for scene in scenes}
    assert len(seen) == 32 == len(PLACES) * len(LIGHTS)


def test_references_add_up_to_the_truth():
    one, three = collage(4, True, 1), collage(4, True, 3)
    assert len(one.controls) == 1 and len(three.controls) == 3 and torch.equal(one.truth, three.truth)
    assert torch.equal(one.controls[0], three.controls[0]) and one.caption == three.caption
    known = torch.stack([(control.int() - three.truth.int()).abs().amax(0) <= 8 for control in three.controls])
    assert known.any(0).float().mean() > 0.9 and known[0].float().mean() < 0.2


@pytest.mark.parametrize("number", range(4))
def test_what_the_masks_show_is_the_truth_and_the_same_in_the_other_controls(number):
    tests = cut_out(number, True, 2), cut_out_of_others(number, True, 2)
    assert torch.equal(tests[0].truth, tests[1].truth)
    for test in tests:
        for control, mask in zip(test.controls, test.masks, strict=True):
            assert (control.int() - test.truth.int())[:, mask].abs().max() <= 8 and 0.02 < mask.float().mean() < 0.98
    shown = [torch.stack(test.masks) for test in tests]
    assert torch.equal(*shown) and not torch.equal(tests[0].controls[0], tests[1].controls[0])


def test_the_figure_is_in_either_control():
    assert {bool(cut_out(number, True, 2).masks[0].float().mean() > 0.5) for number in range(2)} == {True, False}


def test_a_lesson_takes_the_place_of_an_earlier_one(tmp_path):
    lesson = Lesson("i2v", pairs=1, steps=1, tests=1)
    write_data(replace(lesson, pairs=3), tmp_path)
    write_data(lesson, tmp_path)
    assert [path.name for path in (tmp_path / "i2v/start").iterdir()] == ["000.png"]


def test_masks_and_other_tests_are_written_for_the_scripts(tmp_path):
    lesson = Lesson("i2v", pairs=1, steps=1, tests=1, task="cut out", controls=(0, 1), target=2)
    write_data(lesson, tmp_path)
    write_tests(replace(lesson, task="cut out of others"), tmp_path, "i2v/others")
    assert {path.name for path in (tmp_path / "i2v/start").iterdir()} == {
        *("000_0.png", "000_1.png", "000_0_mask.png", "000_1_mask.png")
    }
    for folder in ("i2v", "i2v/others"):
        (line,) = (tmp_path / folder / "prompts.txt").read_text(encoding="utf-8").splitlines()
        prompt = parse_line(line, "prompts.txt", GENERATION)
        assert prompt.control_image_mask_path == tuple(f"{folder}/test/000_{i}_mask.png" for i in range(2))
        mask = load_picture(tmp_path / prompt.control_image_mask_path[0])
        assert torch.equal(mask[0] == 255, lesson.example(0, held_out=True).masks[0])
        assert mask.unique().tolist() == [0, 255]


@pytest.mark.parametrize("task", TASKS)
def test_every_task_has_pictures_of_one_size_and_words_that_the_tokenizer_knows(task):
    unknown = miniature.build_tokenizer().token_to_id("<unk>")
    for number in range(3):
        one = TASKS[task](number, True, 2)
        assert {tuple(each.shape) for each in (*one.controls, one.plain)} == {tuple(one.truth.shape)}
        assert unknown not in miniature.build_tokenizer().encode(one.caption).ids
