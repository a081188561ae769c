"""`rlhf plan`: its roles are those of the stages, its advice holds, and what it cannot plan is told."""

from __future__ import annotations

import json
import re

import pytest
from harness import command, flags

from rlhf.cli import main
from rlhf.config.parse import parse
from rlhf.models.roles import open_dpo, open_grpo, open_ppo, open_rm, open_sft
from rlhf.training.memory import state_bytes
from rlhf.training.plan.cast import cast_of
from rlhf.training.plan.lines import clock, money, size

OPEN = {"sft": open_sft, "rm": open_rm, "dpo": open_dpo, "kto": open_dpo, "ppo": open_ppo, "grpo": open_grpo}


def planned(stage: str, world, capsys, *more: str, **fields) -> dict:
    assert main(["plan", stage, *flags(stage, world, "unused", **fields), *more, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("stage", "fields"),
    [
        ("sft", {}),
        ("sft", {"lora__rank": 2}),
        ("sft", {"frozen_layers": 1, "precision": "fp64"}),
        ("rm", {}),
        ("rm", {"lora__rank": 2}),
        ("dpo", {}),
        ("kto", {"lora__rank": 2}),
        ("ppo", {}),
        ("ppo", {"critic": "zero"}),
        ("ppo", {"roles__mode": "shared", "critic": "none"}),
        ("ppo", {"kl__coef": 0}),
        ("ppo", {"frozen_layers": 1, "critic": "zero"}),
        ("ppo", {"lora__rank": 2, "roles__mode": "adapters", "critic": "zero"}),
        ("grpo", {}),
    ],
    ids=str,
)
def test_the_roles_are_those_that_the_stage_opens(stage, fields, world):
    config = parse(stage, flags(stage, world, "unused", **fields)).config
    roles, cast = OPEN[stage](config), cast_of(config)
    told = state_bytes(cast.policy, *cast.frozen.values())
    real = state_bytes(roles.policy, *roles.frozen)
    if fields.get("roles__mode") == "adapters":  # heads aside, of which the plan's critic has one as the policy's has
        assert told == pytest.approx(real, rel=0.01)
    else:
        assert told == real
    other = cast_of(parse(stage, flags(stage, world, "unused", **fields | {"lora__rank": 3, "frozen_layers": 0})).config)
    assert told != state_bytes(other.policy, *other.frozen.values())


def test_a_plan_of_sft(world, capsys):
    """The rows of the file, the arithmetic of batches, and sums that come out."""
    plan = planned("sft", world, capsys, batch_size=8, micro_batch_size=2)
    rows = len((world / "sft.jsonl").read_text().splitlines())
    assert f"{rows} rows" in plan["rows"]
    assert plan["batches"][0] == "8 rows per optimizer step = 1 process x 2 rows per micro-batch x 4 micro-batches"
    memory = plan["memory"]
    assert memory["peak"] == pytest.approx(sum(memory["state"].values()) + sum(memory["phases"]["update"].values()))
    assert memory["fits"] is True
    assert memory["largest_micro_batch_size"] == 8
    trained = plan["parameters"]["actor"]["trained"]
    assert memory["state"] == {"weights": 4 * trained, "optimizer": 8 * trained}
    assert plan["run"]["steps"] == 4
    assert plan["run"]["seconds"] == pytest.approx(
        plan["run"]["flop"]["training"] / (plan["machine"]["flops"] * plan["machine"]["mfu"])
    )


def test_ppo_has_a_phase_each_and_more_cards_share_the_work(world, capsys):
    more = ("--card=H100", "--gpus=2", "--price-per-hour=2")
    plan = planned("ppo", world, capsys, *more, rollout__batch_size=8, ppo__minibatch_size=8)
    assert plan["memory"]["phases"].keys() == {"rollout", "score", "update"}
    assert {"KV cache", "logits"} <= plan["memory"]["phases"]["rollout"].keys()
    assert plan["memory"]["peak"] == sum(plan["memory"]["state"].values()) + max(
        sum(phase.values()) for phase in plan["memory"]["phases"].values()
    )
    counts = plan["counts"]
    assert [one["processes"] for one in counts] == [1, 2, 4, 8]  # a step has 8 rows
    assert counts[0]["seconds"] > counts[1]["seconds"]
    assert counts[1]["cost"] == pytest.approx(counts[1]["seconds"] / 3600 * 2 * 2)
    assert plan["recommended"]["processes"] == 1
    engines = {one["launch"]: one["peak"] for one in plan["engines"]}
    assert engines.keys() == {"ddp", "zero1", "zero2", "zero2-offload", "zero3", "zero3-offload", "fsdp"}
    assert engines["fsdp"] < engines["ddp"] < engines["zero2"]  # whose buffer of 2 GB outweighs a tiny model


def test_where_it_does_not_fit_what_it_says_to_turn_does(world, capsys):
    fields = {"batch_size": 8, "micro_batch_size": 8}
    whole = planned("sft", world, capsys, **fields)["memory"]["peak"]
    room = f"{int(0.6 * whole / 0.92)}B"
    plan = planned("sft", world, capsys, f"--gpu-memory={room}", **fields)
    memory = plan["memory"]
    assert memory["fits"] is False
    assert 1 <= memory["largest_micro_batch_size"] < 8
    largest = memory["largest_micro_batch_size"]
    for micro, fits in ((largest, True), (largest + 1, False)):
        again = planned("sft", world, capsys, f"--gpu-memory={room}", **fields | {"micro_batch_size": micro})
        assert again["memory"]["fits"] is fits
    assert plan["turn"]
    for turn in plan["turn"]:
        changes = fields | {
            name.replace(".", "__"): value or "true" for name, value in re.findall(r"--(\S+)(?: (\w+))?", turn["flags"])
        }
        again = planned("sft", world, capsys, f"--gpu-memory={room}", **changes)
        assert again["memory"]["peak"] == turn["peak"]
        assert again["memory"]["fits"] is True


def test_where_nothing_fits_that_is_said(world, capsys):
    assert main(["plan", "sft", *flags("sft", world, "unused"), "--gpu-memory", "10KB"]) == 0
    said = capsys.readouterr().out
    assert "does not fit" in said
    assert "not with micro_batch_size 1 either" in said
    assert "nothing that was tried makes it fit" in said
    assert "time      not known: give --card, or --flops" in said


def test_bf16_under_fsdp_keeps_no_cast_weights(world, capsys):
    """--launch fsdp counts what it divides by 4, and the copy that it samples from."""
    plan = planned("ppo", world, capsys, "--gpus=4", "--launch=fsdp", reward="count:a", critic="zero", kl__coef=0,
                   precision="bf16", rollout__batch_size=4, ppo__minibatch_size=4)  # fmt: skip
    weights = plan["parameters"]["actor"]["bytes"] + plan["parameters"]["critic"]["bytes"]
    assert plan["memory"]["state"]["weights"] == pytest.approx(weights / 4)
    assert plan["memory"]["state"]["optimizer"] == pytest.approx(2 * weights / 4)
    assert plan["memory"]["phases"]["rollout"]["copy for sampling"] == plan["parameters"]["actor"]["bytes"]


def test_rows_as_said_need_no_file(world, capsys):
    plan = planned("sft", world, capsys, "--rows=1000", data="/no/such/file", data__max_length=32, batch_size=10,
                   schedule__unit="epochs", schedule__length=2)  # fmt: skip
    assert plan["run"]["steps"] == 200
    assert plan["run"]["tokens"] == 2 * 1000 * 32
    assert "as said by --rows" in plan["rows"]


@pytest.mark.parametrize(
    ("more", "code", "said"),
    [
        (["--gpu-memory", "80"], 2, "--gpu-memory: given `80`, expected a number and a unit"),
        (["--gpus", "0"], 2, "'0' is not a whole number, at least 1"),
        (["--card", "Voodoo"], 2, "--card Voodoo: not in the table; there are A10"),
        (["--flops", "-1"], 2, "'-1' is not a number above 0"),
        (["--mfu", "40"], 2, "--mfu 40: expected a part of 1"),
        (["--gpus", "2", "--nproc", "2"], 2, "--gpus and --nproc say the same"),
        (["--measure", "--card", "H100"], 2, "--measure runs here"),
        (["--model", "no-such-model"], 65, "no-such-model"),
        (["--data.max_lenght", "5"], 78, "max_length"),
        (["--launch", "zero2", "--gpus", "1"], 78, "nobody to divide with"),
        (["--data", "no-such-file.jsonl"], 65, "no-such-file.jsonl"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_planned_is_told(more, code, said, world, capsys):
    given = flags("sft", world, "unused")
    names = {word for word in more if word.startswith("--")}
    kept = [flag for flag in given if flag.split("=")[0] not in names]
    assert main(["plan", "sft", *kept, *more]) == code
    assert said in capsys.readouterr().err


def test_no_stage_is_one_message(capsys):
    assert main(["plan"]) == 2
    assert "rlhf plan STAGE" in capsys.readouterr().err


@pytest.mark.slow
def test_the_plan_beside_what_was_measured(world, tmp_path):
    """The stage is run for it, and nothing of it is left."""
    log, before = tmp_path / "log", sorted(world.rglob("*"))
    arguments = ["plan", "sft", *flags("sft", world, tmp_path / "run"), "--measure", "--json"]
    assert command(arguments, log) == 0, log.read_text()
    text = log.read_text()
    found = json.loads(text[text.index("{") : text.rindex("}") + 1])["measured"]
    assert found["peak"] > 0
    assert found["as_it_is"]["steps"] == 20
    assert found["as_it_is"]["tokens_per_second"] > 0
    assert found["seconds"] == pytest.approx(found["as_it_is"]["seconds_per_step"] * 4)
    assert not (tmp_path / "run").exists()
    assert sorted(world.rglob("*")) == before


def test_sizes_times_and_money_in_words():
    assert [size(0), size(2.5e6), size(80e9)] == ["", "2.5 MB", "80.00 GB"]
    assert [clock(None), clock(3.25), clock(600), clock(7260)] == ["", "3.2 s", "10 min", "2 h 01 min"]
    assert [money(None), money(1234.5)] == ["", "1,234.50"]
