"""`saerl compare`: methods at equal KL, from runs of `saerl evaluate`, or from policies as training measured them.

summary.json    methods {name: {runs, trainable_parameters, nonzero, seconds, ...}}, table, the limits, and in `note`
                what must be known of final policies
table.csv, costs.csv, figure.csv, sparsity.csv    as `saerl_cli.report.compare` writes them
"""

from saerl_cli.analysis.compare import baseline_of, common_kls, comparison, methods_of
from saerl_cli.analysis.evaluations import choose
from saerl_cli.config.compare import CompareConfig
from saerl_cli.run.directory import Run


def check(config: CompareConfig) -> None:
    """Refuse runs that are missing, unfinished or not comparable.

    Raises:
        ValueError: one line saying what is wrong.
    """
    methods = methods_of(choose(config.paths(), config.across).evaluations, config)
    baseline_of(methods, config.baseline)
    if config.kls is None:
        common_kls(methods)


def work(config: CompareConfig, run: Run) -> None:
    """Compare; write summary.json, the tables and figures, print the tables."""
    from saerl_cli.report.compare import print_comparison, write_comparison

    chosen = choose(config.paths(), config.across)
    methods, numbers = comparison(chosen, config)
    write_comparison(run.path, methods, numbers)
    run.update(inputs={"runs": [str(evaluation.path) for evaluation in chosen.evaluations]})
    run.summary(numbers)
    print_comparison(methods, numbers)
