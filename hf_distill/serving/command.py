"""The command `serve`: a model's hidden states for students that run elsewhere."""

import argparse
import logging
import os
import sys
from pathlib import Path
from typing import Any

import torch

from hf_distill.serving.server import HiddenStateServer, describe
from hf_distill.teachers import ModelTeacher, place_model

logger = logging.getLogger(__name__)

PORT = 8077
NUMBERS = {
    "max_rows": (256, "rows of a request, at most"),
    "max_tokens": (65536, "tokens of a request, at most"),
    "max_waiting": (16, "requests that may wait; more get status 503"),
    "batch_tokens": (16384, "tokens of a forward"),
}


def add_serve(parsers: Any) -> None:
    """Add the command to those of a command line."""
    serve = parsers.add_parser("serve", help="answer token ids with a model's hidden states")
    serve.set_defaults(run=run)
    serve.add_argument("model", help="of the hub, or a folder")
    serve.add_argument("--host", default="127.0.0.1", help="this machine, if it is left out")
    serve.add_argument("--port", type=int, default=PORT, help="%(default)s; 0 takes a free one")
    token = serve.add_mutually_exclusive_group()
    token.add_argument("--token_file", help="a file with the token that requests must bear")
    token.add_argument("--token_env", help="the environment variable with that token")
    serve.add_argument("--revision", help="of the model")
    serve.add_argument("--dtype", help="such as bfloat16")
    serve.add_argument("--quantization", choices=("8bit", "4bit"))
    serve.add_argument("--device", help="such as cuda:1; the first accelerator, if left out")
    serve.add_argument("--max_length", type=int, help="tokens of a row; the model's, if left out")
    for name, (default, text) in NUMBERS.items():
        serve.add_argument(f"--{name}", type=int, default=default, help=f"{text}; %(default)s")


def read_token(options: argparse.Namespace) -> str | None:
    """Return the token that a command line names.

    Raises:
        ValueError: the file or the variable is not there, or empty.
    """
    if options.token_env is not None:
        found = os.environ.get(options.token_env, "").strip()
        where = f"the environment variable {options.token_env}"
    elif options.token_file is not None:
        path, where = Path(options.token_file), options.token_file
        found = path.read_text(encoding="utf-8").strip() if path.is_file() else ""
    else:
        return None
    if not found:
        raise ValueError(f"{where} must hold the server's token")
    return found


def run(options: argparse.Namespace) -> int:
    """Serve until the process is ended."""
    given = {"dtype": options.dtype, "quantization": options.quantization}
    if options.revision is not None:
        given["revision"] = options.revision
    try:
        if options.quantization is not None and options.device is not None:
            raise ValueError(
                "a quantized model is placed by its library: leave out --device (and choose with "
                f"CUDA_VISIBLE_DEVICES), got {options.device}"
            )
        token = read_token(options)
        teacher = ModelTeacher(options.model, **given)
        found = torch.accelerator.current_accelerator() or torch.device("cpu")
        place_model(teacher.model, torch.device(options.device or found))
        numbers = {name: getattr(options, name) for name in (*NUMBERS, "max_length")}
        where = {
            "host": options.host,
            "port": options.port,
            "token": token,
            "revision": options.revision,
        }
        server = HiddenStateServer(teacher.model, tokenizer=teacher.tokenizer(), **where, **numbers)
    except (OSError, ValueError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    print(f"serving {describe(server)}", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        logger.info("ended")
    finally:
        server.server_close()
    return 0
