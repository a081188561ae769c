"""Exit codes, of which rlhf/errors.py has the classes."""

from __future__ import annotations

from functools import partial

from rlhf.runs.explain.entry import Entry

Code = partial(Entry, kind="exit code")

EXIT_CODES = (
    Code(
        "0",
        "done: the command did what it was asked",
        "every time",
        "nothing is wrong",
        ("the run finished", "it had finished before, and nothing was left to do", "--help or --dry-run"),
        "nothing",
    ),
    Code(
        "1",
        "a check of the run failed: a self-check, a reward model no better than a coin, a number that is not finite",
        "never",
        "going on would have trained something wrong; the last checkpoint is as it was",
        ("NaN or infinity in loss, gradient or score", "a self-check of the first iteration", "the reward model's accuracy"),
        "read the message, then `rlhf explain` the check it names",
    ),
    Code(
        "2",
        "the command line makes no sense",
        "never",
        "nothing was started",
        ("a misspelt flag or command", "a value missing", "two flags that exclude each other"),
        "the message has the usage; `rlhf WORD --help`",
    ),
    Code(
        "65",
        "bad data: a row, a model directory or a checkpoint does not hold what it should, or an input has changed",
        "never",
        "nothing was trained on it",
        ("a malformed row: its file:line is named", "data, seed or parents changed since the run began",
         "a model without a part that is needed, such as the reward head"),
        "mend the row or `rlhf data clean`; another --output; or --allow-inexact-resume where that is meant",
    ),
    Code(
        "70",
        "a bug of ours; the only case with a traceback",
        "never",
        "something happened that nobody thought of",
        ("a bug of rlhf", "a version of a library that is not in constraints.txt", "a changed recipe"),
        "report it with the traceback; the same command goes on from the last checkpoint",
    ),
    Code(
        "71",
        "out of memory, of the device or of the machine",
        "never",
        "the last checkpoint is as it was",
        ("micro_batch_size is too large", "rows or replies are longer than before", "other programs use the memory"),
        "lower micro_batch_size, gradient_checkpointing: true, rollout.generation_batch_size; none changes the result",
    ),
    Code(
        "73",
        "the output directory cannot be created or written, or is there already",
        "never",
        "nothing was started",
        ("it exists", "no permission", "a path that not every machine sees"),
        "name another --output",
    ),
    Code(
        "74",
        "reading or writing failed half-way, a service gave no answer, or another process of the run is gone",
        "never",
        "what was saved is untouched; the same command goes on from there",
        ("the disk is full", "another process was killed, often for memory", "the reward service is down"),
        "make room or mend the service, then the same command again",
    ),
    Code(
        "75",
        "another run is writing into the same directory",
        "never",
        "nothing was started",
        ("the command was started twice", "a run on another machine shares the directory", "two configs with one output"),
        "wait for it, or name another --output",
    ),
    Code(
        "76",
        "paused by an alarm (alarms.action: pause)",
        "only where you asked for it",
        "a run saved its state after the iteration that raised the alarm",
        ("the alarm that the message names", "a limit that is too narrow for this task", "an alarm that got worse since"),
        "read the reply in alarms.jsonl and `rlhf explain` the alarm; the same command goes on",
    ),
    Code(
        "78",
        "the config is wrong; the message lists every mistake",
        "never",
        "nothing was started",
        ("a misspelt field", "a value out of its range, or fields that exclude each other", "batch sizes that do not divide"),
        "mend what the message lists; `rlhf schema` lets an editor check it",
    ),
    Code(
        "130",
        "stopped by SIGINT (Ctrl-C)",
        "only where you meant it",
        "a run saved its state at the next step's end",
        ("Ctrl-C", "a script sent it", "a terminal was closed"),
        "the same command again goes on",
    ),
    Code(
        "143",
        "stopped by SIGTERM",
        "only where you or a scheduler meant it",
        "a run saved its state at the next step's end",
        ("the scheduler's time was up", "max_hours was reached", "kill"),
        "the same command again goes on",
    ),
    Code(
        "137",
        "killed by SIGKILL; nothing could be saved at that moment",
        "never",
        "the last checkpoint is where it goes on",
        ("the kernel ran out of memory", "the scheduler lost patience after SIGTERM", "kill -9"),
        "less memory (`rlhf explain 71`), more checkpoints (checkpoint.every); the same command goes on",
    ),
)  # fmt: skip
