"""Command line: `python -m sae_research COMMAND`."""

import argparse
import os
import sys
from collections.abc import Callable

from sae_research.errors import ResearchError


def run(given: argparse.Namespace) -> None:
    """execute one notebook for the record"""
    from sae_research import notebooks

    notebooks.run(given.notebook, given.profile)


def reproduce(given: argparse.Namespace) -> None:
    """run what is missing or changed, then compare and report"""
    from sae_research import pipeline

    print(pipeline.reproduce(given.profile, given.force))


def validate(given: argparse.Namespace) -> int:
    """run the executed notebooks again and compare every output (nbval)"""
    from sae_research import notebooks

    return notebooks.validate(given.profile)


def world(given: argparse.Namespace) -> None:
    """the toy models"""
    from sae_research.world import build

    if not given.build:
        raise ResearchError(
            "say `world --build` to build the toy models anew (an hour on two cores)."
        )
    build.build()


def real_saes(given: argparse.Namespace) -> None:
    """the SAEs of the real model"""
    from sae_research import real_saes

    if not given.build:
        raise ResearchError(
            "say `real_saes --build` to train the real model's SAEs anew (an hour on two cores)."
        )
    for recipe in real_saes.RECIPES.values():
        real_saes.build(recipe)


def settings(given: argparse.Namespace) -> None:
    """write the settings in force, which the stages depend on"""
    from sae_research import pipeline

    pipeline.write_settings(given.profile)


def doctor(given: argparse.Namespace) -> int:
    """whether this machine can run each profile, and what is missing"""
    from sae_research import doctor

    text, code = doctor.run(given.profile or None)
    print(text)
    return code


def profiles(given: argparse.Namespace) -> None:
    """settings of each profile against the papers' values"""
    from sae_research import settings_page

    if given.write:
        settings_page.write()
    print(settings_page.text())


def stages(given: argparse.Namespace) -> None:
    """the stages of dvc.yaml, from the real imports"""
    from sae_research import stages

    if given.write:
        stages.write()
    else:
        print(stages.text())


def claims(given: argparse.Namespace) -> None:
    """the verdict table of a profile"""
    from sae_research import claims, ledger

    if given.write:
        ledger.write_pages()
        return
    if given.grounds:
        frame = ledger.compare_grounds(ledger.read_grounds())
        print(frame.to_markdown(index=False, disable_numparse=True))
        return
    lines = claims.read(given.profile)
    print(ledger.markdown(lines) if given.markdown else ledger.text(lines))


def clear(given: argparse.Namespace) -> None:
    """clear the outputs of all notebook sources before a commit"""
    from sae_research import notebooks

    changed = notebooks.clear()
    print(f"cleared: {', '.join(changed)}" if changed else "all notebook sources were clear")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sae_research", description="Reproduce the studies and their claims."
    )
    commands = parser.add_subparsers(dest="command", required=True)

    def command(do: Callable, profile: str | None = "cpu", **switches: str | None) -> None:
        made = commands.add_parser(do.__name__, help=do.__doc__, description=do.__doc__)
        made.set_defaults(do=do)
        if do is run:
            made.add_argument("notebook", help="name without .ipynb")
        if profile is not None:
            words = f"profile of params.yaml (default {profile})"
            made.add_argument("--profile", default=profile, help=words)
        for name, words in switches.items():
            made.add_argument(f"--{name}", action="store_true", help=words)

    command(run)
    command(reproduce, force="run every stage, the toy models included")
    command(validate)
    anew = "build data/embedded anew; a killed build goes on where it stopped"
    command(world, None, build=anew)
    again = "train them anew into data/real_saes; a killed training goes on where it stopped"
    command(real_saes, None, build=again)
    command(doctor, "")
    command(profiles, None, write="bring docs/settings.md in step")
    command(settings)
    command(stages, None, write="bring dvc.yaml in step")
    side = "verdicts on toy models, a real model and the papers' models side by side"
    command(
        claims,
        markdown=None,
        grounds=side,
        write="bring README's verdicts and docs/verdicts.md in step",
    )
    command(clear, None)
    return parser


def main(words: list[str] | None = None) -> int:
    """Run one command; a mistake of the user's or the machine's is told in one sentence."""
    given = _parser().parse_args(words)
    try:
        code = given.do(given)
        sys.stdout.flush()
        return code or 0
    except ResearchError as error:
        print(error, file=sys.stderr)
    except BrokenPipeError:  # whoever read the output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        from sae_research.paths import ROOT, relative

        where = relative(error.filename) if error.filename else f"the disk of {ROOT}"
        remedy = "free disk space or mend the permissions, then run again."
        print(f"{where}: {error.strerror or error}; {remedy}", file=sys.stderr)
    except KeyboardInterrupt:
        words = "stopped; finished work is kept, run the same command again to go on."
        print(words, file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
