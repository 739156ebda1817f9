"""Rank the latents of your SAE by how cleanly they can be expected to steer.

python screen_your_sae.py --model gpt2 --sae gpt2-small-res-jb blocks.8.hook_resid_pre \\
    --downstream gpt2-small-res-jb blocks.10.hook_resid_pre --texts my_texts.txt
"""

import argparse
import sys
from pathlib import Path

import sae_research as sr


def load_texts(path: str | None, model: sr.LanguageModel) -> list[str]:
    """Paragraphs of a text file; without one, articles that the toy model was trained on."""
    if path is not None:
        return [p for p in Path(path).read_text(encoding="utf-8").split("\n\n") if p.strip()]
    from sae_research.world.text.documents import make_documents

    tokens = make_documents("article", 400, seed=1).tokens
    return [model.tokenizer.decode(row, skip_special_tokens=True) for row in tokens]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="world-text", help="hub name, folder or catalogue name")
    parser.add_argument("--sae", nargs="+", default=["world-text", "block1_topk"])
    parser.add_argument("--downstream", nargs="+", default=["world-text", "block3_jumprelu"])
    parser.add_argument("--texts", help="a text file, paragraphs divided by empty lines")
    parser.add_argument("--out", default="cards", help="folder for the cards")
    parser.add_argument("--quick", action="store_true", help="steer few features")
    given = parser.parse_args()

    model = sr.load_model(given.model)
    sae = sr.load_sae(*given.sae, model=model)  # warns if the SAE does not explain this model
    deep = sr.load_sae(*given.downstream, model=model)
    n_features = 30 if given.quick else 200
    ranking = sr.screen_features(
        model, sae, load_texts(given.texts, model), downstream=deep, n_features=n_features
    )
    print(ranking)
    print(ranking.table[["rank", "prediction", "S_abs", "C"]].head(10).round(3).to_markdown())
    best = int(ranking.table.index[0])
    Path(given.out).mkdir(exist_ok=True)
    print("card:", ranking.card(best).save(f"{given.out}/latent_{best}.html"))

    with model.steer(sae, latent=best, coefficient=10.0):
        print("steered:", model.generate("the", 12))


if __name__ == "__main__":
    try:
        main()
    except sr.ResearchError as error:
        sys.exit(str(error))
