"""`rlhf report RUN`: a run, or a pipeline, as one HTML page."""

from __future__ import annotations

import json
from pathlib import Path

from rlhf.config.arguments import Parser

USAGE = """\
rlhf report RUN [--output FILE] [--json]

  One HTML page about a run of any stage, or about a pipeline (RUN/sft, RUN/rm, RUN/ppo): the verdict in plain words, curves,
  the same prompts' replies over time, calibration, time by phase, what it was made from, the command to run it again.
  The page needs no network and no other file. A run that failed, or goes on, has one too.
  --output FILE   where to write it (default: RUN/report.html); a report there is replaced, no other file is
  --json          the verdict for a program: {"report", "level": good|warn|bad, "runs": [...]}"""


def run(argv: list[str]) -> int:
    parser = Parser(USAGE)
    parser.add_argument("run", type=Path)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--json", action="store_true", dest="as_json")
    given = parser.parse_args(argv)

    from rlhf.report.html.verdict import worst
    from rlhf.report.html.write import WORDS, write_report

    target, pages = write_report(given.run, given.output)
    level = worst([finding for page in pages for finding in page.findings])
    if given.as_json:
        runs = [
            {"run": page.run, "stage": page.stage, "state": page.state, "level": page.level}
            | {"findings": [{"level": finding.level, "text": finding.text} for finding in page.findings]}
            for page in pages
        ]
        print(json.dumps({"report": str(target), "level": level, "runs": runs}, indent=2))
        return 0
    for page in pages:
        for finding in page.findings:
            print(f"{page.run}  {finding.level:4}  {finding.text}")
    print(f"{WORDS[level]}: {target}")
    return 0
