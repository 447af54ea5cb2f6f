"""The command line: Typer reads the command word and its flags, Hydra every word after it."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

app = typer.Typer(
    name="saerl",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"max_content_width": 120},
    help="RLHF restricted to sparse-autoencoder feature coefficients, so that what it taught can be read.",
    epilog="Examples: saerl COMMAND --help. To resume a job repeat its command with hydra.run.dir=DIR (saerl runs).",
)
INTERRUPTED = 130
"""What Typer makes of a `KeyboardInterrupt`, without a word."""
HYDRA = {"ignore_unknown_options": True}  # lets -m, --cfg job, --config-dir DIR through to Hydra


class Command(TyperCommand):
    """A command whose help has its examples."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Read the examples only when the help is asked for."""
        from saerl_cli.run.examples import examples

        self.epilog = examples()[str(self.name)]
        super().format_epilog(ctx, formatter)


def help_with_settings(ctx: typer.Context, asked: bool) -> None:
    """Print the usual help, then every setting of the command."""
    if asked:
        from saerl_cli.run.help import settings_help

        typer.echo(ctx.get_help())
        typer.echo("\n" + settings_help(str(ctx.info_name).replace("-", "_")))
        raise typer.Exit


def complete(ctx: typer.Context, incomplete: str) -> list[str]:
    """Candidates for a half-typed override."""
    from saerl_cli.run import bridge

    return bridge.complete(str(ctx.info_name).replace("-", "_"), ctx.params.get("overrides") or [], incomplete)


Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Settings, config groups, Hydra's flags.", autocompletion=complete),
]
Help = Annotated[
    bool, typer.Option("--help", is_eager=True, callback=help_with_settings, help="Show this and every setting.")
]


@contextlib.contextmanager
def exit_codes() -> Iterator[None]:
    """Turn what a user causes into one line: a ValueError is exit code 2, an OSError (a full disk) 1."""
    from saerl_cli.run.bridge import refuse

    try:
        yield
    except ValueError as error:
        refuse(error)
    except OSError as error:
        typer.echo(f"saerl: {error}", err=True)
        raise typer.Exit(1) from None


def hydra(name: str, words: list[str] | None) -> None:
    """Hand the words to Hydra; heavy imports begin behind this line."""
    from saerl_cli.run import bridge

    bridge.run(name, words or [])


@app.command("demo", cls=Command, context_settings=HYDRA, add_help_option=False)
def demo(overrides: Overrides = None, help: Help = False) -> None:
    """Run the whole pipeline on the planted model, offline."""
    hydra("demo", overrides)


@app.command("train-lm", cls=Command, context_settings=HYDRA, add_help_option=False)
def train_lm(overrides: Overrides = None, help: Help = False) -> None:
    """Train a small Pythia-architecture language model."""
    hydra("train_lm", overrides)


@app.command("train-sae", cls=Command, context_settings=HYDRA, add_help_option=False)
def train_sae(overrides: Overrides = None, help: Help = False) -> None:
    """Train sparse autoencoders at one or more sites."""
    hydra("train_sae", overrides)


@app.command("eval-sae", cls=Command, context_settings=HYDRA, add_help_option=False)
def eval_sae(overrides: Overrides = None, help: Help = False) -> None:
    """Measure trained SAEs on held-out text."""
    hydra("eval_sae", overrides)


@app.command("train-reward", cls=Command, context_settings=HYDRA, add_help_option=False)
def train_reward(overrides: Overrides = None, help: Help = False) -> None:
    """Train a reward model on preference pairs."""
    hydra("train_reward", overrides)


@app.command("rlhf", cls=Command, context_settings=HYDRA, add_help_option=False)
def rlhf(
    overrides: Overrides = None,
    sparse_coeffs: Annotated[
        bool, typer.Option("--sparse-coeffs", help="Learn SAE feature coefficients only: adapter=sparse_coeffs.")
    ] = False,
    help: Help = False,
) -> None:
    """RLHF by PPO; --sparse-coeffs restricts it to SAE features."""
    sugar = ["adapter=sparse_coeffs"] if sparse_coeffs else []
    hydra("rlhf", [*sugar, *(overrides or [])])  # the last word wins, so the user's does


@app.command("evaluate", cls=Command, context_settings=HYDRA, add_help_option=False)
def evaluate(overrides: Overrides = None, help: Help = False) -> None:
    """Measure a finished policy on fresh prompts."""
    hydra("evaluate", overrides)


@app.command("features", cls=Command, context_settings=HYDRA, add_help_option=False)
def features(overrides: Overrides = None, help: Help = False) -> None:
    """Show what features are and what RLHF did to them."""
    hydra("features", overrides)


@app.command("audit", cls=Command, context_settings=HYDRA, add_help_option=False)
def audit(overrides: Overrides = None, help: Help = False) -> None:
    """Find the features that caused a policy's reward."""
    hydra("audit", overrides)


@app.command("compare", cls=Command, context_settings=HYDRA, add_help_option=False)
def compare(overrides: Overrides = None, help: Help = False) -> None:
    """Compare policies at equal KL, of the folders named (a sweep, for instance) or of runs=…."""
    from saerl_cli.run.words import with_folders

    with exit_codes():
        words = with_folders(overrides or [], "runs")
    hydra("compare", words)


@app.command("export", cls=Command)
def export(
    path: Annotated[
        str,
        typer.Argument(
            metavar="PATH",
            help="Run of saerl train-sae, SAE folder, or sae_lens:RELEASE/ID; run of saerl rlhf, or adapter folder.",
        ),
    ],
    to: Annotated[
        str,
        typer.Option("--to", help="SAEs: saelens, dictionary_learning or sparsify. Policies: compact, peft or model."),
    ],
    out: Annotated[Path | None, typer.Option("--out", help="Folder to make; beside PATH when empty.")] = None,
    site: Annotated[str | None, typer.Option("--site", help="Only the SAEs of this site, as mlp_out.3.")] = None,
    first: Annotated[
        int | None, typer.Option("--first", help="Of a policy, only the features that its audit ranks first.")
    ] = None,
) -> None:
    """Write SAEs in the format of another library, or a policy as a small adapter or a model."""
    from saerl_cli.jobs.export import export as work

    with exit_codes():
        typer.echo("\n".join(work(path, to, out, site, first)))


@app.command("report", cls=Command)
def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="PATH", help="Run directories of any command, or folders that hold some.")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", help="The page; report.html in the first PATH when empty.")
    ] = None,
    describe: Annotated[
        bool, typer.Option("--describe", help="First write features.json into coefficient runs without one.")
    ] = False,
) -> None:
    """Write one HTML page of runs: curves, frontiers, features, samples, behaviour."""
    from saerl_cli.jobs.report import report as work

    with exit_codes():
        typer.echo(work(runs, out, describe))


@app.command("reproduce", cls=Command)
def reproduce(
    name: Annotated[str, typer.Argument(metavar="NAME", help="An experiment, as 001-demo; or a YAML file of one.")],
    variables: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="What the experiment needs, as model=DIR.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder of its runs; runs/reproduce/NAME if empty.")] = None,
    jobs: Annotated[int | None, typer.Option("--jobs", help="CPU cores, or jobs on a cluster at a time.")] = None,
    scale: Annotated[str, typer.Option("--scale", help="full, or small: only shows that every stage runs.")] = "full",
    on: Annotated[str, typer.Option("--on", help="Where stages run: local or slurm.")] = "local",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show stages, commands, time and memory.")] = False,
    no_compare: Annotated[bool, typer.Option("--no-compare", help="Run without comparing with the record.")] = False,
) -> None:
    """Repeat an experiment and compare it with its recorded numbers.

    Finished stages are skipped, also after a kill: repeat the command. Exit code 0 when everything agrees.
    """
    from saerl_cli.reproduce.command import reproduce as work

    with exit_codes():
        code = work(name, variables or [], out, jobs, scale, on, dry_run, no_compare)
    raise typer.Exit(code)


@app.command("plan", cls=Command, context_settings=HYDRA)
def plan(
    command: Annotated[
        str, typer.Argument(metavar="COMMAND", help="train-lm, train-sae, train-reward, rlhf, evaluate or eval-sae.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="The words that would follow the command.")
    ] = None,
    sparse_coeffs: Annotated[bool, typer.Option("--sparse-coeffs", help="As for saerl rlhf.")] = False,
    sae: Annotated[
        str, typer.Option("--sae", help="Words of the saerl train-sae that makes SAEs which are not there yet.")
    ] = "",
    length: Annotated[
        float | None,
        typer.Option("--length", help="Tokens of a completion on average, where nothing is run."),
    ] = None,
    device: Annotated[
        str, typer.Option("--device", help="A GPU by its published numbers, as a100-80gb or h200; or here.")
    ] = "",
    probe: Annotated[
        bool, typer.Option("--probe/--no-probe", help="Run the job shortly here, once or twice; what is found is kept.")
    ] = True,
    again: Annotated[bool, typer.Option("--again", help="Run it again; the faster is kept.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    out: Annotated[Path | None, typer.Option("--out", help="Write that JSON to a file too.")] = None,
) -> None:
    """Say what memory and time a job needs before it runs."""
    import shlex

    sugar = ["adapter=sparse_coeffs"] if sparse_coeffs else []
    with exit_codes():
        from saerl_cli.plan.command import plan as planned
        from saerl_cli.plan.table import text_of
        from saerl_cli.run.files import as_json as json_of
        from saerl_cli.run.files import write_json

        found = planned(command, [*sugar, *(overrides or [])], device, probe, shlex.split(sae), length, again)
        if out is not None:
            write_json(out, found)
        typer.echo(json_of(found) if as_json else text_of(found))


@app.command("runs", cls=Command)
def runs(
    folders: Annotated[
        list[Path] | None, typer.Argument(metavar="FOLDER", help="Where to look; ./runs if empty.")
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Show numbers and samples of running jobs until they end.")
    ] = False,
) -> None:
    """List runs with their status, numbers and resume commands."""
    from saerl_cli.run.listing import listing

    with exit_codes():
        for folder in folders or []:
            if not folder.is_dir():
                raise ValueError(f"there is no folder {folder}")
    if watch:
        from saerl_cli.run.watching import watch as watch_runs

        with contextlib.suppress(KeyboardInterrupt):  # how one leaves it
            watch_runs(folders or [Path("runs")])
    typer.echo(listing(folders or [Path("runs")]))


@app.command("completion")
def completion(shell: Annotated[str, typer.Argument(help="Only bash.")] = "bash") -> None:
    """Print the bash completion of commands and settings.

    Put `eval "$(saerl completion bash)"` into ~/.bashrc; --install-completion alone installs only a part of it.
    """
    if shell != "bash":
        raise typer.BadParameter(f"completion is written for bash, not {shell}")
    typer.echo('eval "$(_SAERL_COMPLETE=source_bash saerl)"')
    typer.echo("COMP_WORDBREAKS=${COMP_WORDBREAKS//=}")  # model=<TAB> is one word
    typer.echo("complete -o nospace -o default -F _saerl_completion saerl")  # no space after key=


def main() -> None:
    """Entry point: a mistyped command line is one line and exit code 2."""
    if len(sys.argv) == 1:
        sys.argv.append("--help")
    usage_error: Any = typer.BadParameter.__mro__[1]  # typer shows the class only under private names
    from saerl_cli.run.stopping import stoppable

    try:
        with stoppable():
            code = app(prog_name="saerl", standalone_mode=False)
            if code == INTERRUPTED:
                raise KeyboardInterrupt
        sys.exit(code)
    except usage_error as error:
        typer.echo(f"saerl: {error.format_message()} (saerl --help)", err=True)
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort):
        typer.echo("saerl: interrupted", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
