"""From words to settings: spellings of the original, what follows from what, the set of flags."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest

from lifequant import options, presets, registry
from lifequant.common.errors import OTHER_NAMES, UserError

# (typed, lifelong method, quantizer, loss, sampler)
SPELLINGS = [
    ("", "ours", "proxq", "ball_prior", "ball"),
    ("--method ours", "ours", "proxq", "ball_prior", "ball"),
    ("--method lifeq", "ours", "proxq", "ball_prior", "ball"),
    ("--method life_q --ll_method ours --balanced True", "ours", "proxq", "ball_prior", "ball"),
    ("--method life_q --ll_method original", "original", "proxq", "ce", "uniform"),
    ("--method lsq --ll_method ours", "ours", "lsq", "ball_prior", "ball"),
    ("--method=proxq --ll_method=replay", "replay", "proxq", "ce", "uniform"),
    ("--method replay", "replay", "lsq", "ce", "uniform"),
    ("--method original --ll_method original", "original", "lsq", "ce", "uniform"),
    ("--method joint --quantizer proxq", "joint", "proxq", "ce", "uniform"),
    ("--method ours --quantizer lsq", "ours", "lsq", "ball_prior", "ball"),
    ("--balanced False", "ours", "proxq", "ce", "uniform"),
    ("--balanced false --loss ball", "ours", "proxq", "ball", "uniform"),
    ("--method ours --preset paper", "ours", "proxq", "ball", "ball"),
]


@pytest.mark.parametrize(("typed", "method", "quantizer", "loss", "sampler"), SPELLINGS)
def test_method_and_quantizer(typed, method, quantizer, loss, sampler):
    config, _ = options.parse(typed.split())
    assert (config.method, config.ll_method, config.quantizer) == (method, method, quantizer)
    assert (config.loss, config.sampler) == (loss, sampler)


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("--method lsq", ["names a quantizer", "--ll_method"]),
        ("--method life_q --quantizer lsq", ["two quantizers"]),
        ("--method ours --ll_method replay", ["two lifelong methods"]),
        ("--method repaly", ["unknown method", "did you mean 'replay'"]),
        ("--method lif_q", ["unknown method", "did you mean 'life_q'"]),
        ("--method life_q --ll_method our", ["unknown method", "did you mean 'ours'"]),
        ("--quantizer prox", ["unknown quantizer", "did you mean 'proxq'"]),
        (
            "--target_model resnet19",
            ["unknown model 'resnet19'", "'resnet18'", "(known: resnet20, resnet56, and torch"],
        ),
        ("--target_model resnet18 --shortcut conv", ["--shortcut conv is for resnet20 and resnet56"]),
        ("--stem cifar", ["--stem is for torchvision's models, and resnet20 is none"]),
        (
            "--target_model resnet18 --source_weights V9",
            ["no such weights of resnet18 (known: IMAGENET1K_V1, DEFAULT)"],
        ),
        ("--target_model resnet18 --source_weights DEFAULT --source_file x", ["both name the model to start from"]),
        ("--target_model ResNet-20", ["did you mean 'resnet20'"]),
        ("--quantizer LSQ", ["did you mean 'lsq'"]),
        ("--method Ours", ["did you mean 'ours'"]),
        ("--method lifequnt", ["did you mean 'lifequant'"]),
        ("--method lifequant --ll_method finetune", ["two lifelong methods"]),
        ("--batch_size 32", ["unknown flag --batch_size; here it is called --train_batch_size"]),
        ("--learning-rate 1", ["here it is called --lr "]),
        ("--num-epochs 1", ["did you mean '--num_epochs'"]),
        ("--bitW 4,4", ["--bitW takes the bit-width of the weights", "--abitW", "--bit_schedule"]),
        ("--bitW 4 4", ["unexpected argument '4' after --bitW 4"]),
        ("--source_model resnet56", ["--source_model resnet56 does not fit"]),
        ("--preset paper --method replay", ["--preset paper"]),
        ("--num_epoch 3", ["unknown flag --num_epoch", "did you mean '--num_epochs'"]),
        ("--method replay --proxq_c 3", ["--proxq_c is a flag of the quantizer proxq"]),
        ("--lr 0.1 0.2", ["unexpected argument '0.2'"]),
        ("--pretrained True", ["--source_file"]),
        ("--act_quantizer lsqq", ["unknown quantizer", "did you mean 'lsq"]),
        ("--bit_schedule 4,8", ["--bit_schedule", "falling"]),
        ("--bit_schedule 32,7", ["--bit_schedule", "falling"]),
        ("--bit_schedule 32,4 --bitW 8", ["leave --bitW out"]),
        ("--bit_schedule 32,4 --test_only", ["--test_only and --bit_schedule"]),
        ("--layer_bits layer3", ["--layer_bits", "PATTERN=BITS"]),
        ("--layer_bits layer3=7", ["--layer_bits", "PATTERN=BITS"]),
        ("--start_task 1", ["--from"]),
        ("--from x", ["--start_task"]),
        ("--balanced maybe", ["--balanced", "neither True nor False"]),
        ("--lr_decay_steps 10,x", ["--lr_decay_steps", "'x'"]),
        *((f"--bitW {bits}", ["--bitW"]) for bits in ("1", "7", "16", "4.5")),
        *((f"--lr {lr}", ["--lr", "finite number above 0"]) for lr in ("-0.1", "0", "nan", "inf", "fast")),
        ("--proxq_c -1", ["--proxq_c"]),
        ("--ll_lambda nan", ["--ll_lambda"]),
        ("--replay_rate 120", ["--replay_rate"]),
        ("--replay_batch 1", ["--replay_batch", "a share below 1"]),
        ("--replay_codec webp --replay_quality 101", ["--replay_quality", "from 1 to 100"]),
        ("--replay_quality 30", ["--replay_quality has no meaning with --replay_codec raw"]),
        ("--replay_codec bits4 --replay_quality 30", ["--replay_quality has no meaning with --replay_codec bits4"]),
        ("--method ewc --replay_selection herding", ["--replay_selection needs stored images"]),
        ("--memory_budget 1XB", ["--memory_budget", "no number of bytes like 500kB"]),
        ("--importance_bits 4", ["--importance_bits"]),
        ("--method replay --importance_bits 8", ["--importance_bits: replay", "keeps no importances"]),
        ("--memory_budget 0", ["--memory_budget"]),
        ("--replay_code_new", ["--replay_code_new has no meaning"]),
        ("--method ewc --replay_codec webp", ["--replay_codec needs stored images, and ewc stores none"]),
        ("--method ewc --replay_batch 0.5", ["--replay_batch needs stored images", "ewc stores none", "--buffer_size"]),
        ("--num_tasks 0", ["--num_tasks"]),
    ],
)
def test_refused(typed, words):
    with pytest.raises(UserError) as error:
        options.parse(typed.split())
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_other_names_are_flags_of_none():
    """What is suggested exists, and what it is suggested for does not."""
    flags = {word.removeprefix("--") for word in options.build_parser()[0]._option_string_actions}
    others = [other for names in OTHER_NAMES.values() for other in names.split()]
    assert OTHER_NAMES.keys() <= flags and not flags & set(others) and len(set(others)) == len(others)


def test_aliases_of_methods():
    """They are typed; what a run stores is the method's own name."""
    for typed, name in (("lifequant", "ours"), ("finetune", "original")):
        for argv in (["--method", typed], ["--method", "life_q", "--ll_method", typed]):
            meant = [name if word == typed else word for word in argv]
            assert options.parse(argv) == options.parse(meant) and options.parse(argv)[0].method == name
        assert registry.method(typed) is registry.method(name) and typed not in registry.names("method")


def test_a_preset_chooses_the_method_and_goes_by_bits(monkeypatch, tmp_path):
    """A file is a preset; what is typed stands before it, of the nearest bit-width."""
    by_bits = {"4": {"quantizer": "lsqplus", "distill": 1.0}, "2": {"ema": 0.9}}
    content = {"help": "", "settings": {"method": "replay", "loss": "balanced_softmax"}, "by_bits": by_bits}
    (tmp_path / "paper.json").write_text(json.dumps(content), encoding="utf-8")
    monkeypatch.setattr(presets, "FOLDER", tmp_path)

    def chosen(*more: str) -> tuple:
        config, _ = options.parse(["--preset", "paper", *more])
        return config.method, config.loss, config.quantizer, config.distill, config.ema

    assert chosen() == chosen("--bitW", "8") == ("replay", "balanced_softmax", "lsqplus", 1.0, 0.0)
    assert chosen("--bitW", "2") == chosen("--bit_schedule", "8,4,2") == ("replay", "balanced_softmax", "lsq", 0.0, 0.9)
    assert chosen("--quantizer", "pact", "--loss", "ce") == ("replay", "ce", "pact", 1.0, 0.0)


def test_preset_paper():
    config, _ = options.parse(["--preset", "paper"])
    assert (config.loss, config.sampler, config.penalty) == ("ball", "ball", "proxq_paper")
    assert config.ll_lambda == 100 and config.quantizer == "proxq" and config.option("proxq")["c"] == 3
    config, _ = options.parse(["--preset", "paper", "--loss", "ce", "--proxq_c", "2", "--lambda", "7"])
    assert (config.loss, config.ll_lambda, config.option("proxq")["c"]) == ("ce", 7, 2)
    ours, _ = options.parse([])
    assert (ours.loss, ours.sampler, ours.penalty) == ("ball_prior", "ball", "proxq") and ours.option("proxq")[
        "c"
    ] is None


def test_pretrained():
    """True where --source_file is given, unless said otherwise."""
    assert options.make().pretrained is False
    assert options.make(source_file="model.pt").pretrained is True
    assert options.make(source_file="model.pt", pretrained=False).pretrained is False
    assert options.parse(["--source_file", "m", "--pretrained"])[0].pretrained is True


def test_values_that_follow():
    config = options.make(bitW=2)
    assert (config.abitW, config.first_last_bits, config.sched) == (2, 8, "cosine")
    assert options.make(abitW=8).bitW == 4
    assert options.make(lr_decay_step=3).sched == "multistep"
    assert options.make(lr_decay_step=3, sched="constant").sched == "constant"
    for typed in (["10,20"], ["10", "20"], ["10,20,"]):
        config, _ = options.parse(["--lr_decay_steps", *typed])
        assert (config.lr_decay_steps, config.sched) == ((10, 20), "multistep")
    for typed in ("--lambda", "--ll_lambda"):
        assert options.parse([typed, "7"])[0].ll_lambda == 7
    strengths = {
        name: options.make(penalty=name).ll_lambda for name in ("none", "proxq", "proxq_step", "proxq_published")
    }
    assert strengths["none"] == 0 and len(set(strengths.values())) == 4
    assert options.make(replay_rate=20).replay_rate == options.make(replay_rate=0.2).replay_rate == 0.2
    assert options.make(replay_rate=0).replay_rate == 0 and options.make(replay_rate=1).replay_rate == 1
    assert options.make(method="original").replay_rate == 0 and options.make().replay_rate is None
    assert options.make(target_model="resnet20_quant", source_model="resnet20").target_model == "resnet20"
    assert options.make(method="original", bitW=8).job_dir == "experiment/original_8bit"
    config, notes = options.parse(["--gpus", "1", "2"])
    assert config.gpus == 1 and len(notes) == 1 and "one GPU" in notes[0]
    assert options.make(resume=False).resume is None
    assert options.make(quantizer="lsq").act_quantizer == "lsq"
    mixed = options.make(quantizer="lsq", act_quantizer="proxq")
    assert (mixed.quantizer, mixed.act_quantizer, "proxq_c" in mixed.options) == ("lsq", "proxq", True)
    assert options.make(layer_bits="layer3.*=8, fc=4/6").bits_of_layers() == {"layer3.*": (8, 8), "fc": (4, 6)}
    assert options.make(bit_schedule="32,8,2").bitW == 2
    assert options.make(method="original", replay_rate=0.5).replay_rate == 0.5  # replay for any method that is given it
    shares = {name: options.make(method=name).replay_batch for name in ("replay", "derpp", "er_ace", "ours", "ewc")}
    assert shares == {"replay": 0.5, "derpp": 0.5, "er_ace": 0.5, "ours": 0, "ewc": 0}  # as their papers draw a batch
    assert options.make(method="replay", replay_rate=0).replay_batch == 0
    sizes = {"1MB": 10**6, "0.5 kB": 500, "2GB": 2 * 10**9, "1MiB": 2**20, "77": 77, "77B": 77, "1k": 1000}
    assert {text: options.make(memory_budget=text).memory_budget for text in sizes} == sizes
    for codec, quality, coded in (("raw", None, False), ("webp", 50, True), ("jpeg", 50, True), ("bits4", None, True)):
        config = options.make(replay_codec=codec)
        assert (config.replay_quality, config.replay_code_new) == (quality, coded)
    assert options.make(replay_codec="webp", replay_code_new=False).replay_code_new is False
    assert options.make(method="ewc", buffer_size=5, replay_batch=25).replay_batch == 0.25


def test_results_hold_no_paths():
    config = options.make(job_dir="here", data_dir="there", source_file="model.pt", resume="elsewhere")
    every, shown = config.asdict(), config.asdict(paths=False)
    paths = {"csv_dir", "data_dir", "cache_dir", "source_dir", "source_file", "job_dir", "resume", "reset", "from_run"}
    assert set(every) - set(shown) == paths
    assert shown["proxq_c"] is None and shown["bitW"] == 4


def test_inert_flags_say_so_once():
    """Accepted with a value, several or none, as the original's command lines have them."""
    typed = "--stage 1 --refine --random True --keep_grad --lam 1 --lam2 1 --act_range 0 2 --mask_step 3"
    config, notes = options.parse(typed.split())
    assert config == options.make()
    assert len(notes) == 8
    for name in ("stage", "refine", "random", "keep_grad", "lam", "lam2", "act_range", "mask_step"):
        assert sum(note.startswith(f"--{name} has no effect: ") for note in notes) == 1
    assert options.parse(["--balanced", "True", "--method", "replay"])[1][0].startswith("--balanced has no effect")
    assert options.parse(["--balanced", "True"])[1] == []


FLAGS = {
    "data": """csv_dir dataset data_dir cache_dir cache num_tasks task_id num_classes image_size augment crop_scale lt_gamma imbalance_ratio
        val_fraction replay_rate buffer_size replay_batch replay_selection memory_budget replay_codec replay_quality replay_code_new""",
    "method and its parts": """method ll_method preset balanced loss sampler penalty ll_lambda lambda importance_bits distill
        distill_temperature ema head_epochs nme""",
    "model and quantizer": """arch target_model source_model shortcut stem quantizer act_quantizer bitW abitW first_last_bits
        layer_bits per_channel bit_schedule bn_reestimate track_oscillations freeze_oscillating pretrained source_dir
        source_file source_weights""",
    "training": """num_epochs train_batch_size eval_batch_size lr step_lr sched warmup_epochs lr_gamma optimizer lr_decay_step
        lr_decay_steps momentum weight_decay seed""",
    "run": """job_dir resume reset start_task from test_only device gpus compile amp tf32 deterministic checkpoint_seconds keep_checkpoints on_nan print_freq eval_every
        list""",
    "accepted from the original, without effect": "stage refine random keep_grad lam lam2 act_range mask_step",
    "quantizer proxq": "proxq_c proxq_learn_c",
}


def test_help(capsys):
    """A new flag belongs in this table, and in the README's; a flag of the original never goes."""
    with pytest.raises(SystemExit) as end:
        options.parse(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    parser, _ = options.build_parser()
    found = {}
    for group in parser._action_groups:
        found[group.title] = {name[2:] for action in group._group_actions for name in action.option_strings}
        found[group.title].discard("help")
        if group._group_actions:
            assert f"\n{group.title}:\n" in text
            assert all(re.search(rf"^  .*--{name}\b", text, re.MULTILINE) for name in found[group.title])
    assert {title: flags for title, flags in found.items() if flags and title != "options"} == {
        title: set(names.split()) for title, names in FLAGS.items()
    }


def test_every_flag_is_explained():
    """Every flag has a text; one with a default that is a value shows it."""
    parser, own = options.build_parser("ours", "proxq")
    assert set(own) == {"proxq_c", "proxq_learn_c"}
    for action in parser._actions:
        assert action.help and len(action.help) > 8, action.dest
    defaults = {f.name: f.default for f in fields(options.Config) if f.metadata}
    for action in parser._actions:
        if defaults.get(action.dest) not in (None, ""):
            assert "default" in action.help, action.dest


@pytest.mark.parametrize("bits", ["4", "2"])
def test_preset_tuned_is_what_the_search_chose(bits):
    """The flags of the best row; no part on top of it gained half a point. The search had new and stored images in one pool."""
    file = Path(__file__).resolve().parents[1] / f"resnet-20-cifar-10/results/search_tuned_{bits}bit/found.json"
    found = json.loads(file.read_text(encoding="utf-8"))
    assert found["settings"] | {"replay_batch": 0.0} == presets.settings("tuned", int(bits))
    scores = {json.dumps(row["flags"], sort_keys=True): row["score"] for row in found["tried"]}
    assert scores[json.dumps(found["settings"], sort_keys=True)] > max(scores.values()) - 0.5
    assert found["protocol"]["tasks"]["held_out"] and found["protocol"]["flags"]["bitW"] == int(bits)
