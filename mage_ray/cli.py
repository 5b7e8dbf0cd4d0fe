"""The command line ``mage-ray``: one verb per job. Nothing heavy is imported before a verb runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mage_ray.analysis import ANALYSES
from mage_ray.cluster import end_as_interrupted
from mage_ray.errors import FieldError, UserError

if TYPE_CHECKING:
    from rich.console import Console


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb. Returns the exit status: 0, 2 for a mistake in the input or a full disk, 130 when interrupted."""
    options = _parser().parse_args(arguments)
    try:
        end_as_interrupted()  # what `ray job stop` and orchestrators send
        options.run(options)
    except UserError as error:
        print(f"mage-ray: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"mage-ray: {where}{error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        again = "--resume" if options.run is _search else "the same command"
        print(f"mage-ray: interrupted; {again} goes on from here", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mage-ray", description="Controllable multi-objective generation: every request picks its own trade-off."
    )
    verbs = parser.add_subparsers(required=True, metavar="verb")

    def verb(name: str, run: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        added = verbs.add_parser(name, help=text, description=text)
        added.set_defaults(run=run)
        return added

    def takes_study(of: argparse.ArgumentParser, default: str | None = None) -> None:
        of.add_argument("--study", required=default is None, default=default, help="a study's YAML, or its folder")
        of.add_argument("--folder", help="where the study's folder is or goes (default: runs/<name of the study>)")

    takes_study(verb("demo", _demo, "Train and evaluate on the embedded model, and show three answers."), DEMO)
    takes_study(verb("train", _train, "Sample the rollout pool and train the experts."))
    takes_study(verb("values", _values, "Train explicit value models on the rollout pool, and measure them."))
    takes_study(verb("baselines", _baselines, "Train the policies and reward models of baselines on the rollout pool."))
    takes_study(verb("rewards", _rewards, "Train reward models on pairs or labelled texts, and measure them."))
    evaluate = verb("evaluate", _evaluate, "Generate and score the grid of preferences and methods; write the report.")
    takes_study(evaluate)
    evaluate.add_argument("--recipe", metavar="FILE", help="one more to compare: a search's recipe")

    analyse = verb("analyse", _analyse, "Measure when merging and guiding work, on a trained study.")
    analyse.add_argument("analysis", nargs="+", choices=ANALYSES, metavar="analysis", help=", ".join(ANALYSES))
    takes_study(analyse)

    search = verb("search", _search, "Search a trained study's constants by Ray Tune, and write a recipe of the best.")
    takes_study(search)
    begun = search.add_mutually_exclusive_group()
    begun.add_argument("--resume", action="store_true", help="go on with a search that was cut short")
    begun.add_argument("--fresh", action="store_true", help="forget the search that is there, and begin anew")

    compare = verb("compare", _compare, "Train, tune and test every method side by side; write comparison.json.")
    takes_study(compare)
    compare.add_argument("--seed", type=int, help="in place of the study's; its folder is runs/<name>-<seed> then")
    compare.add_argument("--fresh", action="store_true", help="forget that the test prompts have been used")
    compare.add_argument("--against", metavar="FILE", help="another comparison.json: do both rank the methods alike?")

    generate = verb("generate", _generate, "Answer one prompt at a preference, as it is written.")
    generate.add_argument("prompt", help="the prompt; - reads it from standard input")
    generate.add_argument("--study", required=True, help="a trained study's folder")
    generate.add_argument("--preference", required=True, help="weights that sum to 1: helpful=0.7,short=0.3")
    generate.add_argument(
        "--recipe", metavar="FILE", help="a search's: its method and constants in place of the study's"
    )
    generate.add_argument("--method", help="a decoding method (default: the recipe's, or mage-i-m)")
    generate.add_argument("--strength", type=float, help="of the guidance (default: the study's)")
    generate.add_argument("--candidates", type=int, help="tokens that the guide ranks (default: the study's)")
    generate.add_argument("--every", type=int, default=1, help="guide the first of every so many tokens")
    generate.add_argument("--entropy", type=float, default=0.0, help="guide where the base is that uncertain, in nats")
    generate.add_argument("--speculate", type=int, default=0, help="let the base propose so many tokens at a time")
    generate.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end at this text; repeatable")
    generate.add_argument("--max-new-tokens", type=int, default=200)
    generate.add_argument("--temperature", type=float, help="(default: the recipe's, or 0.7)")
    generate.add_argument("--top-p", type=float, help="(default: the recipe's, or 1)")
    generate.add_argument("--seed", type=int, default=0)

    remove = verb(
        "remove", _remove, "Delete parts of a study's folder, wherever they lie; what makes them makes them anew."
    )
    remove.add_argument("--study", required=True, help="a study's folder")
    remove.add_argument("part", nargs="+", help="values/final-helpful, evaluation …")

    export = verb("export", _export, "Merge experts into one PEFT adapter, or into full weights.")
    export.add_argument("--expert", action="append", metavar="DIR", help="a PEFT adapter; once for each expert")
    export.add_argument("--coefficients", help="one number for each expert: --coefficients=1.75,-0.75")
    export.add_argument("--study", help="instead of experts: a trained study's folder")
    export.add_argument("--preference", help="with --study: the preference to merge for")
    export.add_argument("--method", help="with --study: a method of one row (default: the recipe's, or bone-soup)")
    export.add_argument("--recipe", metavar="FILE", help="with --study: a search's constants in place of the study's")
    export.add_argument("--out", required=True, metavar="DIR", help="a folder that isn't there yet")
    export.add_argument("--full", action="store_true", help="merged full weights in place of an adapter")
    export.add_argument("--model", help="with --full: the base model (default: the one that the experts name)")
    return parser


DEMO = str(Path(__file__).parent / "data" / "demo.yaml")


def _demo(options: argparse.Namespace) -> None:
    from mage_ray import jobs

    jobs.demo(*jobs.open_study(options.study, options.folder), _console())


def _train(options: argparse.Namespace) -> None:
    from mage_ray import jobs

    jobs.train(*jobs.open_study(options.study, options.folder), _console())


def _values(options: argparse.Namespace) -> None:
    from mage_ray import jobs

    jobs.values(*jobs.open_study(options.study, options.folder), _console())


def _baselines(options: argparse.Namespace) -> None:
    from mage_ray import jobs

    jobs.baselines(*jobs.open_study(options.study, options.folder), _console())


def _rewards(options: argparse.Namespace) -> None:
    from mage_ray import jobs

    jobs.rewards(*jobs.open_study(options.study, options.folder), _console())


def _evaluate(options: argparse.Namespace) -> None:
    from mage_ray import jobs

    jobs.evaluate(*jobs.open_study(options.study, options.folder), _console(), options.recipe)


def _analyse(options: argparse.Namespace) -> None:
    from mage_ray import jobs

    jobs.analyse(*jobs.open_study(options.study, options.folder), options.analysis, _console())


def _search(options: argparse.Namespace) -> None:
    from mage_ray import jobs

    study, folder = jobs.open_study(options.study, options.folder)
    jobs.search(study, folder, _console(), resume=options.resume, fresh=options.fresh)


def _compare(options: argparse.Namespace) -> None:
    from mage_ray import jobs

    study, folder = jobs.open_study(options.study, options.folder, options.seed)
    jobs.compare(study, folder, _console(), fresh=options.fresh, against=options.against)


def _generate(options: argparse.Namespace) -> None:
    from mage_ray.decoding.methods import KNOWN
    from mage_ray.decoding.plan import Cadence
    from mage_ray.decoding.request import Sampling
    from mage_ray.folder import StudyFolder
    from mage_ray.preference import parse_preference
    from mage_ray.search.recipe import load_recipe, own_recipe

    # All that can be checked without loading a model is.
    study = StudyFolder.open(options.study).study
    preference = parse_preference(options.preference, study.objective_names)
    recipe = own_recipe(study, "mage-i-m") if options.recipe is None else load_recipe(options.recipe)
    recipe.applied(study)
    method = options.method or recipe.method
    if method not in KNOWN:
        raise FieldError("method", method, f"one of {', '.join(KNOWN)}")
    temperature, top_p = (0.7, 1.0) if options.recipe is None else (recipe.temperature, recipe.top_p)
    temperature = temperature if options.temperature is None else options.temperature
    top_p = top_p if options.top_p is None else options.top_p
    sampling = Sampling(options.max_new_tokens, temperature, top_p, options.seed, tuple(options.stop))
    cadence = Cadence(options.every, options.entropy, options.speculate)

    from mage_ray.generator import Generator

    generator = Generator.open(options.study, recipe=options.recipe, rows=16)
    prompt = sys.stdin.read() if options.prompt == "-" else options.prompt
    for piece in generator.stream(
        prompt,
        preference,
        method,
        strength=options.strength,
        candidates=options.candidates,
        cadence=None if cadence.always else cadence,
        sampling=sampling,
    ):
        print(piece, end="", flush=True)
    print()


def _remove(options: argparse.Namespace) -> None:
    from mage_ray import jobs

    jobs.remove(jobs.open_study(options.study)[1], options.part)


def _export(options: argparse.Namespace) -> None:
    from mage_ray.export import export_experts, export_study

    if (options.study is None) == (options.expert is None):
        raise UserError("export: give --expert DIR … with --coefficients, or --study DIR with --preference")
    if options.study is not None:
        if options.preference is None:
            raise FieldError("--preference", "nothing", "weights that sum to 1, as name=weight,…")
        export_study(options.study, options.preference, options.method, Path(options.out), options.full, options.recipe)
        return
    if options.coefficients is None:
        raise FieldError("--coefficients", "nothing", f"{len(options.expert)} numbers, one for each --expert")
    try:
        coefficients = [float(number) for number in options.coefficients.split(",")]
    except ValueError:
        raise FieldError("--coefficients", options.coefficients, "numbers with commas between them") from None
    export_experts(options.expert, coefficients, Path(options.out), options.full, options.model)


def _console() -> Console:
    from rich.console import Console

    # A pipe or a log has no width of its own; the tables want 100 columns.
    return Console(width=None if sys.stdout.isatty() else 100)
