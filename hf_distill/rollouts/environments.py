"""Environments judge completions and may continue a dialogue."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from hf_distill.data.episodes import FAILED_SIBLINGS, Attempt, Episode
from hf_distill.data.hints import Messages


@dataclass(frozen=True)
class Feedback:
    """Holds what an environment says to an attempt.

    Args:
        messages: the dialogue's next messages, to which the student replies. The dialogue ends if
            there are none.
        columns: values that hints can read as if they were in the row, such as a verifier's error
            or the number of a wrong turn. "score" also ranks the attempts of a group: the best
            other one above 0 becomes the column "sibling".
    """

    messages: Messages = field(default_factory=list)
    columns: Mapping[str, Any] = field(default_factory=dict)


# Judges attempts, all that are waiting at once; called after each round of replies
Environment = Callable[[Sequence[Attempt]], Sequence[Feedback]]


class Contexts(Protocol):
    """Gives token ids of dialogues: a `HintCollator`."""

    def next_context(self, episode: Episode) -> list[int]:
        """Return the student's ids up to its next reply."""
        ...

    def text(self, ids: Sequence[int]) -> str:
        """Return the text of a completion, to be read."""
        ...


def _answers(environment: Environment, attempts: list[Attempt]) -> Sequence[Feedback]:
    answers = environment(attempts)
    if len(answers) != len(attempts) or not all(isinstance(x, Feedback) for x in answers):
        got = [type(x).__name__ for x in answers]
        raise ValueError(
            f"the environment must give one Feedback for each of {len(attempts)} attempts, "
            f"got {len(got)}: {', '.join(sorted(set(got)))}"
        )
    return answers


def play(
    episodes: Sequence[Episode],
    sample: Callable[[Sequence[Sequence[int]], int], list[list[int]]],
    contexts: Contexts,
    environment: Environment | None,
    max_turns: int,
    end_ids: Sequence[int],
    goes_on: Callable[[bool], bool] = bool,
) -> None:
    """Fill episodes with replies, and with what the environment says, round by round.

    Args:
        episodes: new ones, with their contexts.
        sample: completions of contexts, given the number of the round.
        contexts: renders what comes between the replies.
        environment: None for one reply each.
        max_turns: replies of an episode; the environment's messages behind the last are dropped.
        end_ids: tokens that end a reply. A reply that was cut off ends its episode.
        goes_on: whether there is another round, given whether an episode here waits for one. Where
            processes must sample together it is whether any of them has one: `sample` then gets no
            contexts here.

    Raises:
        ValueError: the environment does not answer each attempt with a `Feedback`, or continues a
            dialogue whose prompt is text.
    """
    waiting = [(episode, episode.context) for episode in episodes]
    for turn in range(max_turns):
        completions = sample([ids for _, ids in waiting], turn)
        for (episode, _), completion in zip(waiting, completions, strict=True):
            episode.completions.append(completion)
            episode.texts.append(contexts.text(completion))
        if environment is None:
            return
        ended = [completion[-1] in end_ids for completion in completions]
        attempts = [e.attempt(end) for (e, _), end in zip(waiting, ended, strict=True)]
        answers = _answers(environment, attempts) if attempts else []
        answered = zip(waiting, ended, answers, strict=True)
        waiting = []
        for (episode, _), has_ended, feedback in answered:
            episode.columns |= feedback.columns
            if not feedback.messages or not has_ended or turn + 1 == max_turns:
                continue
            if isinstance(episode.prompt, str):
                raise ValueError("the environment can continue chat messages only, got a text")
            episode.said.append(list(feedback.messages))
            waiting.append((episode, contexts.next_context(episode)))
        if turn + 1 < max_turns and not goes_on(bool(waiting)):
            return


def share_siblings(episodes: Sequence[Episode]) -> None:
    """Set the columns "sibling", "failed_sibling" and "failed_siblings".

    They are the texts of the group's best other attempt with a score above 0, of its first other
    attempt with a score that is not, and a list of all of these.
    """
    for episode in episodes:
        others = [e for e in episodes if e.group == episode.group and e is not episode]
        judged = [e for e in others if e.columns.get("score") is not None]
        failed = [e.texts[-1] for e in judged if has_failed(e)]
        if failed:
            episode.columns |= {"failed_sibling": failed[0], FAILED_SIBLINGS: failed}
        scored = [e for e in others if (e.columns.get("score") or 0) > 0]
        if scored:
            best = max(scored, key=lambda e: e.columns["score"])
            episode.columns["sibling"] = best.texts[-1]


def has_failed(episode: Episode) -> bool:
    """Return whether the environment's score of an episode is not above 0.

    Raises:
        ValueError: it has given none.
    """
    score = episode.columns.get("score")
    if score is None:
        raise ValueError(
            "rollout.only_failed needs a score of each completion, Feedback(columns={'score': ...})"
            f", got the columns {sorted(episode.columns)}"
        )
    return not score > 0
