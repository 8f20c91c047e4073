"""The command line: ``blockspec run|plan|blocks|plot|show|report|compare|sensitivity``."""

from __future__ import annotations

import os
import signal
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser, Namespace
from rich.console import Console

from blockspec import __version__
from blockspec.runs import report
from blockspec.runs.arguments import check_command, check_flags, gathered

if (
    TYPE_CHECKING
):  # what computes is imported by the commands that compute: help and tables come at once
    from blockspec.engine.plan import Plan
    from blockspec.runs.plotting import PlotSettings
    from blockspec.runs.run import Resources, RunSettings

console = Console(stderr=True)


def run(settings: RunSettings, resources: Resources, out: Path, *, plots: bool) -> None:
    """Estimates spectra and leaves a run folder."""
    from blockspec.numerics.progress import progress_bars
    from blockspec.runs.factories import find_factory
    from blockspec.runs.run import measure

    first = _join_processes()

    def announce(plan: Plan, stages: int) -> None:
        if first:
            report.show_totals(plan, console, stages=stages)

    with progress_bars(shown=first) as progress:
        factory = find_factory(settings.model)
        announced = announce if resources.plan else None
        measure(settings, factory, out, resources=resources, progress=progress, announce=announced)
    if first:
        if plots:
            report.draw(out)
        report.show(out)


def plan(settings: RunSettings, resources: Resources) -> None:
    """Prints what a run would cost, going by its first stage."""
    from blockspec.engine.estimate import foresee_data, plan_spectra
    from blockspec.runs.factories import find_factory
    from blockspec.runs.stages import prepare, stages, with_preconditioner

    todo = stages(settings)
    factory = find_factory(settings.model)
    objective, blocks = prepare(
        settings, todo[0], factory, resources.device, resources.weights_device
    )
    estimate = with_preconditioner(settings.estimate, todo[0], objective)
    cost = plan_spectra(objective, blocks, **asdict(estimate), memory=resources.memory)
    report.show_plan(cost, stages=len(todo))
    if estimate.data == "auto":
        report.show_data(
            foresee_data(objective, blocks, **asdict(estimate), memory=resources.memory),
            estimate.tolerance,
        )


def plot(folder: Path, settings: PlotSettings) -> None:
    """Draws the figures of a run anew from its tables."""
    for path in report.draw(folder, settings):
        print(path)


def main(arguments: list[str] | None = None) -> None:
    """Entry point. Exit code 0, or 1 with one line; a traceback only with --debug."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    try:
        parsed = _parsed([argument for argument in arguments if argument != "--debug"])
        _dispatch(parsed.subcommand, parsed[parsed.subcommand])
    except KeyboardInterrupt as stopped:
        console.print(_how_to_go_on(stopped), highlight=False, soft_wrap=True)
        sys.exit(130)
    except Exception as error:
        if debug:
            raise
        console.print(
            f"blockspec: error: {_one_line(error)}", highlight=False, markup=False, soft_wrap=True
        )
        sys.exit(1)


def _how_to_go_on(stopped: KeyboardInterrupt) -> str:
    """What is said where the work was stopped: by us after a sweep, or wherever it was."""
    saved = f", {stopped.args[0]}" if stopped.args else ""
    told = " (if nobody stopped it, another process has ended: its message says why)"
    told = told if _launched() else ""
    return f"blockspec: stopped{saved}{told}; the same command goes on from the last saved state"


COMMANDS = {
    "run": "estimate spectra and leave a run folder; a second call does what is not done yet",
    "plan": "print what a run would cost: products, gradients, operations, time, peak memory",
    "blocks": "list the blocks of a model before anything is computed: name, kind, layer, size",
    "plot": "draw the figures of a run anew; this needs no model",
    "show": "print what a run found",
    "report": "write a run, or several side by side, as one page of HTML to explore and to send",
    "compare": "compare runs: one table and one figure of their heterogeneity and spectra",
    "sensitivity": "measure which matrices survive few bits, and deal bits out under a budget",
}


def _spelled_out(arguments: list[str]) -> list[str]:
    """``--precondition optimizer.pt`` is short for ``--estimate.precondition optimizer.pt``: a
    setting of the estimate or of the blocks may stand without its group's name.
    """
    if not {"run", "plan"} & set(arguments[:1]):
        return arguments
    from blockspec.engine.settings import EstimateSettings
    from blockspec.runs.settings import BlockSettings

    groups = {"estimate": EstimateSettings, "blocks": BlockSettings}
    long = {f"--{f.name}": f"--{g}.{f.name}" for g, kind in groups.items() for f in fields(kind)}
    split = [argument.partition("=") for argument in arguments]
    return [long.get(name, name) + equals + value for name, equals, value in split]


def _parsed(arguments: list[str]) -> Namespace:
    """The arguments as the command's own parser understands them."""
    called = next((word for word in arguments if not word.startswith("-")), None)
    if called is None or "--version" in arguments[: arguments.index(called)]:
        return _parser(None)[0].parse_args(arguments)
    check_command(called, COMMANDS)
    parser, command = _parser(called)
    given = gathered(_spelled_out(arguments), greedy=called != "blocks")
    check_flags(given, command._option_string_actions)
    try:
        return parser.parse_args(given)
    except SystemExit:
        if {"-h", "--help"} & set(given) and "--model_args" in command._option_string_actions:
            _explain_arguments(given)
        raise


def _explain_arguments(given: Sequence[str]) -> None:
    """The settings of ``--model``: of a Hugging Face model, or of the factory that is named."""
    from blockspec.runs.factories import explained, find_factory
    from blockspec.runs.hugging_face import hugging_face

    named = [word for word in given if ":" in word and not word.startswith("-")]
    if named:
        factory, title = find_factory(named[0]).__wrapped__, named[0]  # type: ignore[attr-defined]
    else:
        factory, title = hugging_face, "a Hugging Face name or folder"
    print(f"\nSettings of --model, where it is {title}:")
    for name, default, text in explained(factory):
        print(f"  --model_args.{name} (default: {default})")
        print(textwrap.fill(text, initial_indent=" " * 24, subsequent_indent=" " * 24, width=98))


def _parser(called: str | None) -> tuple[ArgumentParser, ArgumentParser]:
    """Names all commands, and knows the settings of the one that is called; and that one alone."""
    options: Any = {"exit_on_error": False, "allow_abbrev": False}
    parser = ArgumentParser(
        prog="blockspec",
        description="Blockwise Hessian spectra of transformers.",
        epilog="blockspec COMMAND --help explains the settings of a command.",
        version=__version__,
        **options,
    )
    commands = parser.add_subcommands(required=True)
    chosen = parser
    for name, help in COMMANDS.items():
        command = ArgumentParser(description=help, **options)
        if name == called:
            chosen = command
            _add_settings(command, name)
            command.add_argument(  # taken away before: here for the help alone
                "--debug", action="store_true", help="show the traceback of an error"
            )
        commands.add_subcommand(name, command, help=help)
    return parser, chosen


def _add_settings(command: ArgumentParser, name: str) -> None:
    if name in ("plot", "show"):
        command.add_argument("folder", type=Path, help="a run's folder")
        if name == "plot":
            from blockspec.runs.plotting import PlotSettings

            command.add_class_arguments(PlotSettings)
    elif name == "report":
        command.add_argument("folders", type=Path, nargs="+", help="folders of runs")
        command.add_argument(
            "-o",
            "--out",
            type=Path,
            default=Path("report.html"),
            help="the file that is written; this needs plotly",
        )
    elif name == "compare":
        command.add_argument("folders", type=Path, nargs="+", help="folders of runs")
        command.add_argument(
            "--out", type=Path, required=True, help="folder for the table and the figure"
        )
    elif name == "blocks":
        from blockspec.runs.listing import ListingSettings

        command.add_class_arguments(ListingSettings, skip={"model"})
        command.add_argument(
            "model", help="a factory module:function, or a Hugging Face name or folder"
        )
    elif name == "sensitivity":
        from blockspec.runs.sensitivity import SensitivitySettings

        _add_config(command)
        command.add_class_arguments(SensitivitySettings)
        command.add_argument("--out", type=Path, help="folder for the tables, as csv files")
    else:
        from blockspec.runs.run import Resources, RunSettings

        _add_config(command)
        command.add_class_arguments(RunSettings)
        command.add_class_arguments(Resources)
        command.add_argument("--out", type=Path, required=name == "run", help="the run's folder")
        command.add_argument("--plots", type=bool, default=True, help="draw the figures at the end")


def _add_config(command: ArgumentParser) -> None:
    command.add_argument(
        "--config",
        action=ActionConfigFile,
        help="YAML file of settings; later arguments override it",
    )


def _dispatch(command: str, given: Namespace) -> None:
    if command in ("run", "plan"):
        from blockspec.runs.run import Resources, RunSettings

        settings, resources = (_build(kind, given) for kind in (RunSettings, Resources))
        if command == "run":
            run(settings, resources, given.out, plots=given.plots)
        else:
            plan(settings, resources)
    elif command == "report":
        from blockspec.runs.page.write import report as write_page

        print(write_page(given.folders, given.out))
    elif command == "plot":
        from blockspec.runs.plotting import PlotSettings

        plot(given.folder, _build(PlotSettings, given))
    elif command == "compare":
        report.compare(given.folders, given.out)
    elif command == "blocks":
        from blockspec.runs import listing

        listing.run(_build(listing.ListingSettings, given))
    elif command == "sensitivity":
        from blockspec.runs import sensitivity

        sensitivity.run(_build(sensitivity.SensitivitySettings, given), given.out)
    else:
        report.show(given.folder)


def _build(kind: Any, given: Namespace) -> Any:
    """The dataclass from its flat arguments; nested dataclasses are namespaces."""
    from blockspec.engine.settings import EstimateSettings
    from blockspec.runs.run import BlockSettings

    values = {field.name: given[field.name] for field in fields(kind)}
    nested = {"blocks": BlockSettings, "estimate": EstimateSettings}
    return kind(
        **{
            name: nested[name](**vars(value)) if name in nested else value
            for name, value in values.items()
        }
    )


def _join_processes() -> bool:
    """Joins the other processes where a launcher started several; whether this one is the first."""
    if not _launched():
        return True
    from blockspec.runs.launched import join

    signal.signal(
        signal.SIGTERM, signal.default_int_handler
    )  # how a launcher ends the others when one has died
    return join()


def _launched() -> bool:
    """Whether this is one of several processes."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def _one_line(error: Exception) -> str:
    notes = getattr(error, "__notes__", [])  # what was added on the way, such as the checkpoint
    text = ", ".join(" ".join(part.split()) for part in [str(error), *notes] if part)
    known = (ValueError, TypeError, OSError, ArgumentError, KeyError)
    return (
        text
        if isinstance(error, known) and text
        else f"{type(error).__name__}: {text} (--debug shows where)"
    )


if __name__ == "__main__":
    main()
