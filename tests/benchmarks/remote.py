"""Two servers as teachers: `python -m tests.benchmarks.remote --hidden URL --vllm URL/v1 ...`.

Rows of a text's tokens, all scored, are asked of a server of hidden states and of vLLM's most
probable tokens, in turns, so that both meet the same machine; each round has rows of its own. Per
teacher: rows a second (median over rounds), and bytes of the answers per scored token. The last
column is the median of the rounds' ratios to the first teacher.

Both servers must have been started, with one model and one number of threads:

    OMP_NUM_THREADS=1 python -m hf_distill serve FOLDER --dtype float32 --port 8991
    OMP_NUM_THREADS=1 vllm serve FOLDER --dtype float32 --enforce-eager --port 8992
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from typing import Any

import httpx2
import torch
from transformers import AutoTokenizer

from hf_distill import HiddenStateTeacher, RemoteTeacher
from hf_distill.data.sides import Side


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", required=True, help="such as http://127.0.0.1:8991")
    parser.add_argument("--vllm", required=True, help="such as http://127.0.0.1:8992/v1")
    parser.add_argument("--model", required=True, help="the folder, as vLLM names it")
    parser.add_argument("--text", required=True, help="a jsonl file; all its strings are read")
    parser.add_argument("--top_k", type=int, nargs="+", default=[20])
    parser.add_argument("--rows", type=int, default=8, help="of a batch")
    parser.add_argument("--length", type=int, default=128, help="tokens of a row")
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args()


def sides(args: argparse.Namespace) -> Iterator[Side]:
    """One batch a round."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    ids: list[int] = []
    with open(args.text) as file:
        for line in file:
            strings = [x for x in json.loads(line).values() if isinstance(x, str)]
            ids += tokenizer("\n".join(strings))["input_ids"]
    size = args.rows * args.length
    for number in range(args.rounds + 1):
        part = torch.tensor(ids[number * size : (number + 1) * size])
        rows = part.view(args.rows, args.length)  # an error here: the text is too short
        predicts = torch.ones_like(rows, dtype=torch.bool)
        predicts[:, -1] = False
        yield Side({"input_ids": rows, "attention_mask": torch.ones_like(rows)}, predicts)


def counted_bytes() -> list[int]:
    """The sizes of all answers that any client gets from here on."""
    sizes: list[int] = []
    send = httpx2.Client.send

    def sent(*given: Any, **named: Any) -> Any:
        response = send(*given, **named)
        sizes.append(len(response.read()))
        return response

    httpx2.Client.send = sent
    return sizes


def asked(teacher: Any, side: Side, sizes: list[int]) -> tuple[float, float]:
    """Seconds, and bytes per scored token."""
    sizes.clear()
    begun = time.perf_counter()
    teacher.signal(None, side)
    return time.perf_counter() - begun, sum(sizes) / int(side.predicts.sum())


def main() -> None:
    args = arguments()
    sizes = counted_bytes()
    hidden = HiddenStateTeacher(args.hidden)
    hidden.start()
    teachers: dict[str, Any] = {"hidden states": hidden}
    for top_k in args.top_k:
        teacher = RemoteTeacher(args.vllm, args.model, top_k, timeout=600.0)
        teacher.start(hidden.vocab_size)
        teachers[f"vLLM top {top_k}"] = teacher
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in teachers}
    for number, side in enumerate(sides(args)):
        for name, each in teachers.items():
            measured = asked(each, side, sizes)
            if number:  # the first round is for what is made once
                found[name].append(measured)
    first = [seconds for seconds, _ in next(iter(found.values()))]
    print("| teacher | rows/s | bytes/token | time, in that of the first |\n|---|---|---|---|")
    for name, values in found.items():
        seconds = [x for x, _ in values]
        ratio = statistics.median(a / b for a, b in zip(seconds, first, strict=True))
        rate = args.rows / statistics.median(seconds)
        print(f"| {name} | {rate:.2f} | {values[0][1]:.0f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
