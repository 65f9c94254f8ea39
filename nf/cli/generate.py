"""`nf generate`: text from prompts."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING, Any

from nf.cli.options import (
    DEFAULT_MAX_TOKENS,
    add_engine_options,
    add_sampling_options,
    engine_options,
    named_by_flag,
    sampling_options,
)
from nf.errors import InputError
from nf.hub import BUNDLED_MODEL

if TYPE_CHECKING:
    from nf.cli.prompts import PromptsFile, TextPrompts
    from nf.cli.records import ResultsFile
    from nf.cli.sinks import Sink


_USAGE = """\
%(prog)s [MODEL] -p TEXT [options]
       %(prog)s [MODEL] --prompts-file FILE [--output FILE.jsonl] [options]"""

_EPILOG = """\
prompts file:
  One prompt per line. A line that starts with {, and every line of a .jsonl file, is a JSON object
  with prompt, messages or prompt_token_ids, and if you like custom_id and sampling parameters:
    {"prompt": "import", "stop": ["\\n"]}
    {"custom_id": "q7", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 20}
    {"prompt_token_ids": [1, 5, 9], "sampling_params": {"temperature": 0}}
  A line that cannot be run gets an error as its result; the others are not harmed.

results:
  Text goes to stdout, all else to stderr. With --json or --output there is one JSON object per
  prompt, written as soon as it is finished, whatever the order of the prompts: index (from 0),
  custom_id, the prompt, outputs (text, finish_reason, stop_reason and what else was asked for),
  usage and error. If the file of --output is there already, the run goes on where the last one
  ended, even if that was killed: finished prompts are skipped, those with an error tried again.
  Ctrl-C stops and keeps what is finished; a second one does not wait for anything.

examples:
  nf generate -p "def read_lines(path):" --max-tokens 80
  nf generate -p "import os" -p "class Stack:" --temperature 0
  nf generate ./llama-3.1-8b-instruct --chat --system "Be brief." -p "What is a monad?"
  nf generate ./llama --prompts-file prompts.jsonl --output results.jsonl
  git log --format=%s | nf generate --prompts-file - --json | jq -r .outputs[0].text
"""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "generate",
        help="text from a prompt, or from a file of prompts",
        description="Generate text from one prompt, several, or a file of them.",
        usage=_USAGE,
        epilog=_EPILOG,
    )
    parser.add_argument(
        "model",
        nargs="?",
        default=BUNDLED_MODEL,
        metavar="MODEL",
        help=f"a directory, a Hugging Face name, or the bundled {BUNDLED_MODEL} (default)",
    )
    group = parser.add_argument_group("prompts")
    group.add_argument("-p", "--prompt", action="append", metavar="TEXT", help="a prompt; - is stdin; may be repeated")
    group.add_argument("--prompts-file", metavar="FILE", help="prompts, one per line; - is stdin")
    group.add_argument("--chat", action="store_true", help="a prompt is what the user says in a conversation")
    group.add_argument("--system", metavar="TEXT", help="what the system says first, with --chat")
    group.add_argument("--chat-template", metavar="FILE", help="Jinja template instead of the model's own")

    group = parser.add_argument_group("results")
    group.add_argument("-o", "--output", metavar="FILE", help="write JSON lines to this file; resumes if it exists")
    group.add_argument("--overwrite", action="store_true", help="start --output anew")
    group.add_argument("--json", action="store_true", help="JSON lines on stdout instead of text")
    group.add_argument("--token-ids", action="store_true", help="put token ids into the JSON")
    group.add_argument("--echo", action="store_true", help="show the prompt before the text")
    group.add_argument(
        "--stream",
        action=argparse.BooleanOptionalAction,
        help="show text as it arrives (default if there is one -p)",
    )
    group.add_argument("-q", "--quiet", action="store_true", help="no progress bar, no summary")
    add_sampling_options(parser)
    add_engine_options(parser)


def run(args: argparse.Namespace) -> int:
    """Everything that can be wrong with the options is said before the model is loaded."""
    _check(args)
    options = engine_options(args)
    given = sampling_options(args)
    source = _source(args)
    file = _output_file(args)
    try:
        if args.chat_template is not None:
            options["chat_template"] = _read_text("--chat-template", args.chat_template)
        return _run(args, source, file, options, given)
    finally:
        source.close()
        if file is not None:
            file.close()


def _run(
    args: argparse.Namespace,
    source: PromptsFile | TextPrompts,
    file: ResultsFile | None,
    options: dict[str, Any],
    given: dict[str, Any],
) -> int:
    import asyncio

    from nf.cli.batch import BatchRun, Defaults
    from nf.cli.progress import Progress
    from nf.llm import AsyncLLM

    with named_by_flag():
        model = AsyncLLM(args.model, **options)
    sink = _sink(args, file)
    progress = Progress(total=source.total, bar=_wants_bar(args))
    quiet = args.quiet

    async def work() -> int | None:
        try:
            with named_by_flag():
                params = model.inputs.default_params.with_(**{"max_tokens": DEFAULT_MAX_TOKENS} | given)
            defaults = Defaults(params.with_(seed=None), given.get("seed", 0), args.chat, args.system)
            max_num_seqs = model.loaded.config.max_num_seqs
            assert max_num_seqs is not None
            # As many again as can run wait, so that the dense batch is always full.
            batch = BatchRun(model, sink, progress, defaults, limit=2 * max_num_seqs)
            await batch.run(source)
            return batch.stopped_by
        finally:
            await model.close()

    try:
        stopped_by = asyncio.run(work())
    except BrokenPipeError:
        quiet = True  # whoever read the results has gone
        raise
    finally:
        progress.close()
        sink.close()
        if progress.worked and not quiet:
            print(f"nf generate: {progress.summary()}", file=sys.stderr)
    if stopped_by is not None:
        print(f"nf generate: {_stopped(args, progress.finished)}", file=sys.stderr)
        return 128 + stopped_by
    return 1 if progress.failed else 0


def _check(args: argparse.Namespace) -> None:
    """Options that do not go together."""
    if not args.prompt and args.prompts_file is None:
        raise InputError(
            "-p", 'give a prompt, e.g. nf generate -p "def read_lines(path):", or --prompts-file FILE (- for stdin)'
        )
    if args.prompt and args.prompts_file is not None:
        raise InputError("--prompts-file", "cannot be used with -p; put all prompts into the file")
    if args.system is not None and not args.chat:
        raise InputError("--system", "needs --chat")
    if args.overwrite and args.output is None:
        raise InputError("--overwrite", "needs --output FILE")
    if args.output == "-":
        raise InputError("--output", "takes a file; --json prints the same lines to stdout")
    for flag, path in (("--prompts-file", args.prompts_file), ("--chat-template", args.chat_template)):
        if path is not None and args.output is not None and _same_file(path, args.output):
            raise InputError("--output", f"is the file of {flag}; results need one of their own")
    as_json = args.json or args.output is not None
    for name in ("logprobs", "prompt_logprobs", "token_ids"):
        if getattr(args, name) and not as_json:
            raise InputError("--" + name.replace("_", "-"), "shows in JSON only; add --json or --output FILE")
    if args.echo and as_json:
        raise InputError("--echo", "is for text; the JSON holds the prompt already")
    if args.stream and (as_json or args.prompts_file is not None or len(args.prompt) > 1 or (args.n or 1) > 1):
        raise InputError("--stream", "shows the text of one -p with --n 1, and no --json or --output")


def _source(args: argparse.Namespace) -> PromptsFile | TextPrompts:
    from nf.cli.prompts import PromptsFile, TextPrompts

    if args.prompts_file is not None:
        return PromptsFile(args.prompts_file)
    return TextPrompts([_read_text("-p", 0) if text == "-" else text for text in args.prompt])


def _output_file(args: argparse.Namespace) -> ResultsFile | None:
    from nf.cli.records import ResultsFile

    if args.output is None:
        return None
    file = ResultsFile(args.output, overwrite=args.overwrite)
    if file.finished and not args.quiet:
        print(f"nf generate: {args.output} holds {file.finished:,} results; going on from there", file=sys.stderr)
    return file


def _sink(args: argparse.Namespace, file: ResultsFile | None) -> Sink:
    from nf.cli.sinks import JsonSink, StreamSink, TextSink

    if args.json or file is not None:
        return JsonSink(file, token_ids=args.token_ids)
    single = args.prompts_file is None and len(args.prompt) == 1 and (args.n or 1) == 1
    if single and args.stream is not False:
        return StreamSink(echo=args.echo)
    return TextSink(titles=not single, echo=args.echo)


def _wants_bar(args: argparse.Namespace) -> bool:
    """Streamed text on the terminal is progress enough."""
    streams = args.stream is not False and args.prompts_file is None and len(args.prompt) == 1 and not args.json
    return sys.stderr.isatty() and not args.quiet and not (streams and args.output is None)


def _stopped(args: argparse.Namespace, finished: int) -> str:
    if args.output is not None:
        return f"stopped; {finished:,} results kept in {args.output}, the same command goes on from there"
    return f"stopped; {finished:,} requests were finished"


def _same_file(one: str, other: str) -> bool:
    try:
        return os.path.isfile(one) and os.path.samefile(one, other)
    except OSError:  # one is not there
        return False


def _read_text(flag: str, path: str | int) -> str:
    try:
        with open(path, encoding="utf-8", closefd=path != 0) as file:
            return file.read()
    except OSError as error:
        raise InputError(flag, f"cannot read {path or 'stdin'} ({error.strerror})") from None
    except UnicodeDecodeError:
        raise InputError(flag, f"{path or 'stdin'} is not valid UTF-8") from None
