"""Train a shift for every group of your survey, save it, load it, and answer with it.

python shift_for_your_survey.py --model gpt2 --sae gpt2-small-res-jb blocks.8.hook_resid_pre \\
    --survey my_survey.csv --attributes gender party

The csv has one row per respondent and one column per question (wide), or one row per respondent
and question (long), or counts per group; `sae_research.surveys.files` describes the three layouts.
"""

import argparse
import csv
import random
import sys
from pathlib import Path

import sae_research as sr
from sae_research.studies.opinion_qa.settings import ShiftTraining


def write_example(path: Path) -> Path:
    """A small made-up survey: respondents as rows, questions as columns."""
    topics = ("guns", "police", "borders", "welfare", "climate", "unions", "schools", "farms")
    draws = random.Random(0)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["respondent", "colour", *(f"should we fund {t} ?" for t in topics)])
        for person in range(300):
            colour = draws.choice(["red", "blue"])
            likely = 0.75 if colour == "red" else 0.3
            answers = ["yes" if draws.random() < likely else "no" for _ in topics]
            writer.writerow([person, colour, *answers])
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="world-survey")
    parser.add_argument("--sae", nargs="+", default=["world-survey", "block0_topk"])
    parser.add_argument("--survey", help="your csv; without it, a made-up one is written")
    parser.add_argument("--attributes", nargs="+", default=["colour"])
    parser.add_argument("--template", default="toy", help="english, 'english chat' or toy")
    parser.add_argument("--out", default="shift", help="folder of the saved shift")
    parser.add_argument("--quick", action="store_true", help="few training steps")
    given = parser.parse_args()

    model = sr.load_model(given.model)
    sae = sr.load_sae(*given.sae, model=model)
    path = Path(given.survey) if given.survey else write_example(Path("example_survey.csv"))
    survey = sr.load_survey(path, attributes=given.attributes).split(seed=0)
    groups = [group.name for group in survey.groups]
    print(f"{len(survey.questions)} questions, groups: {', '.join(groups)}")

    steps = 10 if given.quick else 100
    training = ShiftTraining(
        kind="gated", lr=0.03, rank=1, calibration="axes", steps=steps, eval_every=10
    )
    fitted = sr.fit_shift(model, sae, survey, training=training, template=given.template)
    sr.save_shift(fitted, given.out)

    shift = sr.load_shift(given.out, model, sae)
    question = survey.questions[survey.rows("test")[0]]
    print(question.text)
    for group in groups:
        answer = {option: round(p, 3) for option, p in shift.answer(question, group).items()}
        print(f"  {group}: {answer}")


if __name__ == "__main__":
    try:
        main()
    except sr.ResearchError as error:
        sys.exit(str(error))
