"""Command line: `python -m sae_research COMMAND`."""

import argparse
import os
import sys

from sae_research.errors import ResearchError


def _run(given: argparse.Namespace) -> int:
    from sae_research import notebooks

    notebooks.run(given.notebook, given.profile)
    return 0


def _reproduce(given: argparse.Namespace) -> int:
    from sae_research import pipeline

    print(pipeline.reproduce(given.profile, given.force))
    return 0


def _validate(given: argparse.Namespace) -> int:
    from sae_research import notebooks

    return notebooks.validate(given.profile)


def _world(given: argparse.Namespace) -> int:
    from sae_research.world import build

    if not given.build:
        raise ResearchError(
            "say `world --build` to build the toy models anew (15 minutes on two cores)."
        )
    build.build()
    return 0


def _settings(given: argparse.Namespace) -> int:
    from sae_research import pipeline

    pipeline.write_settings(given.profile)
    return 0


def _doctor(given: argparse.Namespace) -> int:
    from sae_research import doctor

    text, code = doctor.run(given.profile or None)
    print(text)
    return code


def _profiles(given: argparse.Namespace) -> int:
    from sae_research import settings_page

    if given.write:
        settings_page.write()
    print(settings_page.text())
    return 0


def _stages(given: argparse.Namespace) -> int:
    from sae_research import stages

    if given.write:
        stages.write()
    else:
        print(stages.text())
    return 0


def _claims(given: argparse.Namespace) -> int:
    from sae_research import claims, ledger

    if given.write:
        ledger.write_highlights()
        return 0
    lines = claims.read(given.profile)
    print(ledger.markdown(lines) if given.markdown else ledger.text(lines))
    return 0


def _clear(given: argparse.Namespace) -> int:
    from sae_research import notebooks

    changed = notebooks.clear()
    print(f"cleared: {', '.join(changed)}" if changed else "all notebook sources were clear")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sae_research", description="Reproduce the studies and their claims."
    )
    commands = parser.add_subparsers(dest="command", required=True)

    def command(
        name: str, do: object, help: str, profile: str | None = "cpu"
    ) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=help, description=help)
        made.set_defaults(do=do)
        if profile is not None:
            made.add_argument(
                "--profile", default=profile, help=f"profile of params.yaml (default {profile})"
            )
        return made

    command("run", _run, "execute one notebook for the record").add_argument(
        "notebook", help="name without .ipynb"
    )
    command(
        "reproduce", _reproduce, "run what is missing or changed, then compare and report"
    ).add_argument("--force", action="store_true", help="run every stage, the toy models included")
    command(
        "validate", _validate, "run the executed notebooks again and compare every output (nbval)"
    )
    command("world", _world, "the toy models", profile=None).add_argument(
        "--build",
        action="store_true",
        help="build data/embedded anew; a killed build goes on where it stopped",
    )
    command(
        "doctor",
        _doctor,
        "whether this machine can run each profile, and what is missing",
        profile="",
    )
    command(
        "profiles", _profiles, "settings of each profile against the papers' values", profile=None
    ).add_argument("--write", action="store_true", help="bring docs/settings.md in step")
    command("settings", _settings, "write the settings in force, which the stages depend on")
    command(
        "stages", _stages, "the stages of dvc.yaml, from the real imports", profile=None
    ).add_argument("--write", action="store_true", help="bring dvc.yaml in step")
    shown = command("claims", _claims, "the verdict table of a profile")
    shown.add_argument("--markdown", action="store_true")
    shown.add_argument("--write", action="store_true", help="bring README's verdicts in step")
    command(
        "clear", _clear, "clear the outputs of all notebook sources before a commit", profile=None
    )
    return parser


def main(words: list[str] | None = None) -> int:
    """Run one command; a mistake of the user's or the machine's is told in one sentence."""
    given = _parser().parse_args(words)
    try:
        code = given.do(given)
        sys.stdout.flush()
        return code
    except ResearchError as error:
        print(error, file=sys.stderr)
    except BrokenPipeError:  # whoever read the output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        from sae_research.paths import relative

        where = relative(error.filename) if error.filename else "a file"
        print(
            f"{where}: {error.strerror or error}; free disk space or mend the permissions, then "
            "run again.",
            file=sys.stderr,
        )
    except KeyboardInterrupt:
        print(
            "stopped; finished work is kept, run the same command again to go on.", file=sys.stderr
        )
    return 1


if __name__ == "__main__":
    sys.exit(main())
