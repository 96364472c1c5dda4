"""A run's settings in TensorBoard: its text tab, its line in the hparams tab, the page of custom scalars."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

from tensorboardX import summary
from tensorboardX.proto import api_pb2, plugin_hparams_pb2
from tensorboardX.proto.summary_pb2 import Summary, SummaryMetadata

from lifequant import options
from lifequant.config import Config
from lifequant.results.versions import versions
from lifequant.runtime.tensorboard import Curves
from lifequant.training.run import Run

FIRST = ("method", "bits", "quantizer", "seed", "penalty")  # columns that the hparams tab shows at once
OTHERS = ("act_quantizer", "loss", "sampler", "ll_lambda", "replay_rate", "buffer_size", "distill", "ema", "optimizer",
          "lr", "train_batch_size", "num_epochs")  # fmt: skip
METRICS = {  # the last value of a curve
    "1_accuracy/average_class_il": "average accuracy (%)",
    "2_forgetting/average": "forgetting (points)",
    "9_memory_kB": "memory (kB)",
}
LAYOUT = {
    "LifeQuant": {
        "average accuracy (%, Class-IL)": ["1_accuracy/average_class_il"],
        "average and each task (%, Class-IL)": ["1_accuracy/(average_class_il|test_task.*)"],
        "average forgetting (points)": ["2_forgetting/average"],
    }
}


def write(run: Run) -> None:
    """Write what is known before the first step."""
    curves, config = run.log.curves, run.config
    curves.add_text("2_command", f"```\n{command()}\n```", 0)
    curves.add_text("3_settings", settings_table(config), 0)
    curves.add_text("4_versions", table(("what", "version"), versions().items()), 0)
    layout = {page: {title: ["Multiline", tags] for title, tags in charts.items()} for page, charts in LAYOUT.items()}
    curves.add(summary.custom_scalars(layout), 0)
    for part in hparams(config):
        curves.add(part, 0)


def write_end(curves: Curves) -> None:
    """Mark the run as finished in the hparams tab."""
    end = plugin_hparams_pb2.SessionEndInfo(status=api_pb2.Status.Value("STATUS_SUCCESS"))
    curves.add(_hparams_part("session_end_info", end), 0)


def command() -> str:
    """This process's command line, a flag a line, to be pasted into a shell."""
    words = [Path(sys.orig_argv[0]).name, *sys.orig_argv[1:]]
    return shlex.join(words).replace(" --", " \\\n  --")


def settings_table(config: Config) -> str:
    """Markdown: every setting and its value; bold where it is not the method's default."""
    defaults = options.make(method=config.method).asdict()
    mark = {name: "**" if value != defaults.get(name, value) else "" for name, value in config.asdict().items()}
    rows = [
        (f"{mark[name]}{name}{mark[name]}", f"{mark[name]}{value}{mark[name]}")
        for name, value in config.asdict().items()
    ]
    return table(("setting", "value"), rows)


def table(head: tuple[str, str], rows: Any) -> str:
    """Markdown: a table of two columns."""
    lines = [head, ("---", "---"), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def columns(config: Config) -> dict[str, str | float | None]:
    """{a column of the hparams tab: its value}. TensorBoard sorts by name and shows the first five at once.

    Seed and bits (of weights and activations, 4/4) are text, since TensorBoard shows a number as 4.0000.
    """
    text = {"bits": f"{config.bitW}/{config.abitW}", "seed": str(config.seed)}
    first = {
        f"{place}_{name}": text[name] if name in text else getattr(config, name) for place, name in enumerate(FIRST, 1)
    }
    return {**first, **{name: getattr(config, name) for name in OTHERS}}


def hparams(config: Config) -> list[Summary]:
    """What the hparams tab needs of a run. Every run names the same columns, since TensorBoard takes those of one run."""
    start, infos = plugin_hparams_pb2.SessionStartInfo(), []
    for name, value in columns(config).items():
        kind = api_pb2.DataType.Value("DATA_TYPE_STRING" if isinstance(value, str) else "DATA_TYPE_FLOAT64")
        infos.append(api_pb2.HParamInfo(name=name, display_name=name.lstrip("12345_"), type=kind))
        if isinstance(value, str):
            start.hparams[name].string_value = value
        elif value is not None:
            start.hparams[name].number_value = value
    metrics = [api_pb2.MetricInfo(name=api_pb2.MetricName(tag=tag), display_name=text) for tag, text in METRICS.items()]
    experiment = api_pb2.Experiment(hparam_infos=infos, metric_infos=metrics)
    return [_hparams_part("experiment", experiment), _hparams_part("session_start_info", start)]


def _hparams_part(name: str, content: Any) -> Summary:
    data = plugin_hparams_pb2.HParamsPluginData(version=0, **{name: content}).SerializeToString()
    plugin = SummaryMetadata.PluginData(plugin_name="hparams", content=data)
    return Summary(value=[Summary.Value(tag=f"_hparams_/{name}", metadata=SummaryMetadata(plugin_data=plugin))])
