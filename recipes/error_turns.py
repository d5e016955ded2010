"""Self-distillation on dialogues, with a hint at the first wrong turn and the loss on it alone.

A tiny model answers a story turn by turn. After each rollout the first wrong turn is found; the
teacher, the model before training, reads the same dialogue with the right value in the user's
message of that turn, and the student learns from what the teacher says of the reply to it. The
student's own context has no hint and no placeholder. One CPU core, some minutes:

    accelerate launch --cpu recipes/error_turns.py --config recipes/error_turns.yaml \
        --output_dir out/turns

Another seed: `--seed 1`. To score every reply from the wrong turn on: `--scored after_hint`. The
output folder gets the model, results.json and completions of the held-out stories.
"""

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from accelerate import PartialState
from torch import nn
from trl.scripts.utils import TrlParser

from helpers import story_dialogues, word_problems
from helpers.accuracy import Accuracy
from helpers.launch import start_missing_processes
from hf_distill import HintCollator, OPSDConfig, OPSDTrainer
from hf_distill.data import Episode
from hf_distill.rollouts import end_token_ids, generate, play


@dataclass
class RecipeArguments:
    """Holds what the recipe itself needs."""

    warm_up_steps: int = field(
        default=500, metadata={"help": "Supervised steps that teach the model to read hints."}
    )
    num_train: int = field(default=4000, metadata={"help": "Stories to learn from, >= 1."})
    num_eval: int = field(default=256, metadata={"help": "Held-out stories to grade, >= 1."})
    scored: str = field(
        default="hinted",
        metadata={"help": "Replies that are scored: hinted (the wrong turn's), after_hint, all."},
    )


def tell(
    model: nn.Module,
    collator: HintCollator,
    rows: Sequence[dict[str, Any]],
    length: int,
    hints: bool,
) -> list[Episode]:
    """Sample greedy dialogues on rows, with or without the value of every turn as a hint."""
    first = (
        [{"role": "user", "content": story_dialogues.hinted(row, 0)} for row in rows]
        if hints
        else []
    )
    prompts = [[message] for message in first] or [row["prompt"] for row in rows]
    episodes = [
        Episode(row, prompt, context=collator.context_ids(prompt))
        for row, prompt in zip(rows, prompts, strict=True)
    ]

    def sample(contexts: Sequence[Sequence[int]], turn: int) -> list[list[int]]:
        return generate(
            model,
            contexts,
            pad_token_id=collator.pad_token_id,
            eos_token_id=collator.eos_token_id,
            max_completion_length=length,
            temperature=0.0,
            seed=0,
        )

    play(
        episodes,
        sample,
        collator,
        story_dialogues.Narrator(hints),
        max_turns=max(len(row["events"]) for row in rows),
        end_ids=end_token_ids(model, collator.eos_token_id),
    )
    return episodes


def grade(episodes: Sequence[Episode]) -> Accuracy:
    """Return the share of stories whose every turn arrives at the right value."""
    right, lengths, ended = 0, 0, 0
    for episode in episodes:
        row: Any = episode.row
        told = len(episode.texts) == len(row["events"])
        right += told and story_dialogues.first_wrong(row, episode.texts) is None
        lengths += sum(map(len, episode.completions))
        ended += told
    return Accuracy(right, len(episodes), lengths / len(episodes), ended / len(episodes))


def main() -> None:
    """Parse, warm up, measure, distil, measure, save."""
    parser = TrlParser(cast(Any, (RecipeArguments, OPSDConfig)))
    recipe, config = parser.parse_args_and_config()
    _ = config.device  # sets the processes up as the arguments say, before anyone else asks
    main_process = PartialState().is_main_process
    logging.basicConfig(level=logging.INFO if main_process else logging.ERROR)
    started = time.perf_counter()
    tokenizer = word_problems.build_tokenizer()
    model = word_problems.build_model(tokenizer, config.seed)
    story_dialogues.warm_up(model, tokenizer, steps=recipe.warm_up_steps, seed=config.seed)
    train, test = story_dialogues.make_splits(recipe.num_train, recipe.num_eval, config.seed)
    collator = HintCollator(tokenizer, story_dialogues.error_hint(), scored=recipe.scored)
    accuracies: dict[str, Accuracy] = {}

    def measure(when: str) -> list[Episode]:
        told = [
            tell(model, collator, test, config.max_completion_length, hints)
            for hints in (False, True)
        ]
        for view, episodes in zip(("unaided", "hinted"), told, strict=True):
            accuracies[f"{view} {when}"] = grade(episodes)
            if main_process:
                print(f"{view} {when:8s} {accuracies[f'{view} {when}']}", flush=True)
        return told[0]

    measure("before")
    trainer = OPSDTrainer(
        model,
        config,
        collator,
        train,
        processing_class=tokenizer,
        environment=story_dialogues.Narrator(),
    )
    trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    trainer.save_model()
    episodes = measure("after")
    if not main_process:
        return
    folder = Path(str(config.output_dir))
    history = [logs for logs in trainer.state.log_history if "loss" in logs]
    results = {
        "accuracies": {name: value.to_dict() for name, value in accuracies.items()},
        "scored_tokens": sum(logs["tokens"] for logs in history),
        "seconds": time.perf_counter() - started,
        "recipe": vars(recipe),
        "config": config.to_dict(),
        "log_history": trainer.state.log_history,
        "dialogues": [episode.messages for episode in episodes],
    }
    (folder / "results.json").write_text(json.dumps(results, indent=1, default=str))
    gain = accuracies["unaided after"].share - accuracies["unaided before"].share
    print(f"unaided {100 * gain:+.1f} points in {results['seconds']:.0f} s; see {folder}")


if __name__ == "__main__":
    start_missing_processes()
    main()
