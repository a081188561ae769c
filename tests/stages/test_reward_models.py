"""The reward model stage beyond plain pairs: ranked replies, the scale of scores, figures, and what PPO makes of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from harness import command, flags, metrics, run, run_on_two
from pydantic import ValidationError
from safetensors.torch import load_file
from torch.nn.functional import logsigmoid
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rlhf.config.parse import parse
from rlhf.config.schema import RmConfig
from rlhf.data.collate import last_row, token_batch
from rlhf.data.examples import RankedExample
from rlhf.models.load import Loading, load_scalar
from rlhf.models.roles import open_ppo
from rlhf.training.reward_figures import figures
from rlhf.training.tiny import WORDS

END = 1


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def random_rows(count: int, seed: int, replies: int = 2) -> list[dict]:
    """Replies in an order that nothing tells."""
    generator = torch.Generator().manual_seed(seed)

    def words(length: int) -> str:
        return " ".join(WORDS[int(i)] for i in torch.randint(0, len(WORDS), (length,), generator=generator))

    lengths = torch.randint(2, 7, (count, replies), generator=generator).tolist()
    return [{"prompt": words(3), "responses": [" " + words(length) for length in row]} for row in lengths]


def result_of(run_directory: Path) -> dict:
    return json.loads((run_directory / "run.json").read_text())["result"]


MIXED = [
    {"prompt": "a b", "responses": [" c d", " e", " f g h"], "ranks": [2, 1, 2]},
    {"prompt": "a b", "chosen": " a a", "rejected": " h", "margin": 0.7},
    {"prompt": "c", "chosen": " a", "rejected": " h h", "tie": True},
    {"prompt": "d e f", "responses": [" a", " b", " c", " d"], "scores": [0.1, 0.4, 0.3, 0.2]},
]
# (row, better, worse, tie): every pair of MIXED, by hand
PAIRS = [(0, 1, 0, 0), (0, 1, 2, 0), (0, 0, 2, 1), (1, 0, 1, 0), (2, 0, 1, 1),
         (3, 1, 0, 0), (3, 2, 0, 0), (3, 3, 0, 0), (3, 1, 2, 0), (3, 1, 3, 0), (3, 2, 3, 0)]  # fmt: skip
ONE_STEP = {"schedule__length": 1, "checkpoint__every": 0, "data__eval": "null", "precision": "fp64", "batch_size": len(MIXED)}


def test_a_step_is_the_mean_over_prompts_of_the_mean_over_pairs(world, tmp_path):
    """Loss and gradient norm of the first step, by transformers' own model and one reply after the other."""
    smoothing, center = 0.1, 0.05
    more = {"data": write(tmp_path / "rows.jsonl", MIXED), "model": world / "critic", "loss__label_smoothing": smoothing,
            "loss__center_coef": center, "micro_batch_size": 3, "optimizer__max_grad_norm": 1e9}  # fmt: skip
    assert run("rm", flags("rm", world, tmp_path / "rm", **ONE_STEP | more), tmp_path / "log") == 0
    model = AutoModelForSequenceClassification.from_pretrained(world / "critic").double().eval()
    tokenizer = AutoTokenizer.from_pretrained(world / "critic")

    def score(row: dict, place: int) -> torch.Tensor:
        reply = row["responses"][place] if "responses" in row else (row["chosen"], row["rejected"])[place]
        return model(torch.tensor([[*tokenizer(row["prompt"] + reply)["input_ids"], END]])).logits[0, 0]

    losses: dict[int, list[torch.Tensor]] = {}
    for number, better, worse, tie in PAIRS:
        one, two = score(MIXED[number], better), score(MIXED[number], worse)
        right = 0.5 if tie else 1 - smoothing
        difference = one - two - MIXED[number].get("margin", 0.0)
        loss = -right * logsigmoid(difference) - (1 - right) * logsigmoid(-difference) + center * (one + two) ** 2
        losses.setdefault(number, []).append(loss)
    loss = sum(sum(of_prompt) / len(of_prompt) for of_prompt in losses.values()) / len(MIXED)
    loss.backward()
    loss = loss.detach()
    norm = sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None) ** 0.5
    [line] = metrics(tmp_path / "rm")
    assert line["loss"] == pytest.approx(float(loss), rel=1e-9)
    assert line["optimizer/grad_norm"] == pytest.approx(norm, rel=1e-6)
    flat = sum(one.item() for of_prompt in losses.values() for one in of_prompt) / len(PAIRS)
    assert abs(flat - float(loss)) > 1e-3  # a mean over all pairs would be told apart


def test_a_pair_is_two_ranked_replies(world, tmp_path):
    pairs = [json.loads(line) for line in (world / "pairs.jsonl").read_text().splitlines()]
    ranked = [{"prompt": row["prompt"], "responses": [row["rejected"], row["chosen"]], "ranks": [2, 1]} for row in pairs]
    left = []
    for name, rows in (("pairs", pairs), ("ranked", ranked)):
        data = write(tmp_path / f"{name}.jsonl", rows)
        arguments = flags("rm", world, tmp_path / name, data=data, data__eval=data, precision="fp64")
        assert run("rm", arguments, tmp_path / "log") == 0, (tmp_path / "log").read_text()
        left.append([line["loss"] for line in metrics(tmp_path / name) if "loss" in line] + [result_of(tmp_path / name)])
    assert left[1][:-1] == pytest.approx(left[0][:-1], rel=1e-12)
    for name in ("accuracy", "accuracy_low", "loss", "margin", "score", "longer_wins", "length_correlation"):
        assert left[1][-1][f"eval/{name}"] == pytest.approx(left[0][-1][f"eval/{name}"], rel=1e-9), name


def test_two_processes_agree(world, tmp_path):
    rows = write(tmp_path / "rows.jsonl", [*MIXED, *random_rows(9, seed=0, replies=3)])
    more = {"data": rows, "data__eval": rows, "normalize": "chosen", "precision": "fp64", "micro_batch_size": 2,
            "batch_size": 5, "loss__center_coef": 0.01}  # fmt: skip
    log = tmp_path / "log"
    assert run("rm", flags("rm", world, tmp_path / "one", **more), log) == 0, log.read_text()
    assert run_on_two("rm", flags("rm", world, tmp_path / "two", **more), log) == [0, 0], log.read_text()
    for one, two in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert {**two, "eval/moved_alone": 0} == pytest.approx({**one, "eval/moved_alone": 0}, rel=1e-8)
    one, two = result_of(tmp_path / "one"), result_of(tmp_path / "two")
    assert one["normalize/gain"] == pytest.approx(two["normalize/gain"], rel=1e-8)
    weights = [load_file(tmp_path / name / "model" / "model.safetensors") for name in ("one", "two")]
    assert torch.allclose(weights[0]["score.weight"], weights[1]["score.weight"], atol=1e-9)


# ---- the scale of scores ---------------------------------------------------------------------------------------------

REFERENCE = [{"prompt": f"a {word}", "completion": f" {word} {other}"} for word in "bcdef" for other in "gh"]


def normalised(world: Path, directory: Path, **more: object) -> Path:
    """A reward model whose scores of REFERENCE have mean 0 and deviation 1."""
    more = {"model": world / "model", "normalize": "reference", "data__eval": "null", "checkpoint__every": 0} | more
    more["data__reference"] = write(directory / "reference.jsonl", REFERENCE)
    assert run("rm", flags("rm", world, directory / "rm", **more), directory / "log") == 0, (directory / "log").read_text()
    return directory / "rm"


def scores_by(model: torch.nn.Module, tokenizer, rows: list[dict]) -> torch.Tensor:
    """By a model's own forward, one after the other."""
    texts = [row["prompt"] + row["completion"] for row in rows]
    with torch.no_grad():
        return torch.cat([model(torch.tensor([[*tokenizer(text)["input_ids"], END]])).logits[0].double() for text in texts])


@pytest.mark.parametrize("kind", ["plain", "adapter", "merged"])
def test_f3_references_have_mean_0_and_deviation_1_after_load(kind, llamas, tmp_path):
    lora = {} if kind == "plain" else {"lora__rank": 2, "lora__merge": str(kind == "merged").lower(), "optimizer__lr": 1e-2}
    made = normalised(llamas, tmp_path, **lora)
    tokenizer = AutoTokenizer.from_pretrained(llamas / "model")
    scores = scores_by(load_scalar(str(made), Loading()), tokenizer, REFERENCE)
    assert scores.mean().item() == pytest.approx(0, abs=1e-5)
    assert scores.std(correction=0).item() == pytest.approx(1, abs=1e-5)
    result = result_of(made)
    before = (scores - result["normalize/bias"]) / result["normalize/gain"]
    assert before.mean().item() == pytest.approx(result["normalize/mean_before"], abs=1e-5)
    assert before.std(correction=0).item() == pytest.approx(result["normalize/std_before"], abs=1e-5)
    assert abs(result["normalize/mean_before"]) > 1e-3
    assert abs(result["normalize/std_before"] - 1) > 1e-2
    if kind == "adapter":
        return
    # What transformers opens has the gain in its weight and the bias in its config: scores are lower by the bias.
    theirs, told = AutoModelForSequenceClassification.from_pretrained(made / "model", output_loading_info=True)
    assert not told["unexpected_keys"]
    assert theirs.config.reward_bias == pytest.approx(result["normalize/bias"], rel=1e-6)
    without = scores_by(theirs, tokenizer, REFERENCE)
    assert torch.allclose(without + theirs.config.reward_bias, scores, atol=1e-5)
    assert abs(theirs.config.reward_bias) > 1e-3


def test_a_scale_is_kept_by_the_next_run_and_by_convert(llamas, tmp_path):
    """Trained on without normalising, at a rate of next to nothing; then merged from an adapter by `rlhf convert`."""
    made = normalised(llamas, tmp_path, lora__rank=2)
    tokenizer = AutoTokenizer.from_pretrained(llamas / "model")
    scores = scores_by(load_scalar(str(made), Loading()), tokenizer, REFERENCE)
    assert command(["convert", str(made), str(tmp_path / "plain"), "--to", "hf"], tmp_path / "log") == 0
    assert torch.allclose(scores_by(load_scalar(str(tmp_path / "plain"), Loading()), tokenizer, REFERENCE), scores, atol=1e-5)
    again = flags("rm", llamas, tmp_path / "again", model=tmp_path / "plain", schedule__length=1, optimizer__lr=1e-12)
    assert run("rm", again, tmp_path / "log") == 0, (tmp_path / "log").read_text()
    assert torch.allclose(scores_by(load_scalar(str(tmp_path / "again"), Loading()), tokenizer, REFERENCE), scores, atol=1e-5)
    on_top = flags(
        "rm", llamas, tmp_path / "top", model=tmp_path / "plain", lora__rank=2, schedule__length=1, optimizer__lr=1e-12
    )
    assert run("rm", on_top, tmp_path / "log") == 0, (tmp_path / "log").read_text()
    assert torch.allclose(scores_by(load_scalar(str(tmp_path / "top"), Loading()), tokenizer, REFERENCE), scores, atol=1e-5)


@pytest.mark.parametrize("mode", ["separate", "shared", "adapters"])
def test_every_mode_of_ppo_has_the_scale(mode, llamas, tmp_path):
    """Reward and critic score as the file does, and a run ends; its critic keeps a bias where it started with one."""
    made = normalised(llamas, tmp_path, **({"lora__rank": 2} if mode == "adapters" else {}))
    own = {"separate": {"critic": made}, "shared": {"critic": "zero"}, "adapters": {"critic": made, "lora__rank": 2}}[mode]
    more = {"actor": llamas / "model", "reward": made, "roles__mode": mode, "data__eval": "null", "schedule__length": 1, **own}
    arguments = flags("ppo", llamas, tmp_path / "ppo", **more)
    roles = open_ppo(parse("ppo", arguments).config)
    tokenizer = AutoTokenizer.from_pretrained(llamas / "model")
    texts = [row["prompt"] + row["completion"] for row in REFERENCE]
    batch = token_batch(last_row([], [*tokenizer(text)["input_ids"], END]) for text in texts)
    scores = roles.rewards["reward"].scores(batch)
    assert scores.mean().item() == pytest.approx(0, abs=1e-5)
    assert scores.std(correction=0).item() == pytest.approx(1, abs=1e-5)
    if mode != "shared":
        assert torch.allclose(roles.policy(batch, roles=("critic",)).values, scores, atol=1e-5)
    assert run("ppo", arguments, tmp_path / "log") == 0, (tmp_path / "log").read_text()
    assert "warning: the reward model" in (tmp_path / "log").read_text()  # no held-out pairs
    critic = load_scalar(str(tmp_path / "ppo"), Loading(), role="critic")
    assert (critic.score.bias is not None) == (mode != "shared")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"normalize": "reference"}, "data.reference and normalize: reference need each other"),
        ({"data": {"train": "d", "reference": "r"}}, "data.reference and normalize: reference need each other"),
        ({"normalize": "chosen"}, "normalize: chosen needs held-out rows"),
        ({"loss": {"label_smoothing": 0.5}}, "less than 0.5"),
    ],
)
def test_configs_that_make_no_sense(given, message):
    with pytest.raises(ValidationError, match=message):
        RmConfig.model_validate({"output": "o", "model": {"path": "m"}, "data": {"train": "d"}, **given})


# ---- how good it is --------------------------------------------------------------------------------------------------


def test_rm_and_eval_tell_the_same(world, tmp_path, capsys):
    from rlhf.cli import main

    rows = write(tmp_path / "rows.jsonl", [*MIXED, *random_rows(12, seed=1, replies=3)])
    arguments = flags("rm", world, tmp_path / "rm", data=rows, data__eval=rows, optimizer__lr=1e-2, schedule__length=9)
    assert run("rm", arguments, tmp_path / "log") == 0, (tmp_path / "log").read_text()
    assert main(["eval", str(tmp_path / "rm"), "--data", str(rows), "--json"]) == 0
    found, result = json.loads(capsys.readouterr().out), result_of(tmp_path / "rm")
    assert (found["pairs"], found["longer_wins"]) == (result["eval/pairs"], pytest.approx(result["eval/longer_wins"]))
    assert found["pairs"] == len(PAIRS) + 12 * 3
    for name, value in found["figures"]["fp32"].items():
        assert value == pytest.approx(result[f"eval/{name}"], abs=1e-5), name
        if name != "moved_alone":
            assert metrics(tmp_path / "rm")[-1][f"eval/{name}"] == result[f"eval/{name}"]
    bins = found["reliability"]["fp32"]
    assert list(bins) == list(result["eval/reliability"])
    for sure, row in bins.items():
        assert row == pytest.approx(result["eval/reliability"][sure], abs=1e-4)
        assert float(sure[:4]) <= row["predicted"] <= float(sure[-4:])
    assert sum(row["prompts"] for row in bins.values()) == pytest.approx(15)  # one has nothing but a tie
    assert "alone in its batch" in (tmp_path / "log").read_text()
    assert main(["eval", str(tmp_path / "rm"), "--data", str(rows)]) == 0
    assert "fp32: how sure it is, and how often it is right" in capsys.readouterr().out


def test_figures_by_hand():
    """Scores go with length; swapped, what was right is wrong; a score that hangs on its batch is found out."""
    pair = [[2, 1], [2, 3, 4, 1]]
    examples = [
        RankedExample([2], pair, [0, 1]),  # the shorter is better
        RankedExample([3], pair, [1, 0]),  # the longer
        RankedExample([4], pair, [1, 0]),
        RankedExample([5], [*pair, [5, 1]], [0, 1, 2]),
    ]
    scores = torch.tensor([0.0, 1, 0, 1, 0, 2, 3, 1, 2], dtype=torch.float64)
    found = figures(examples, scores, scores[:4])
    assert found["accuracy"] == pytest.approx((0 + 1 + 1 + 2 / 3) / 4)
    assert found["margin"] == pytest.approx((-1 + 1 + 2 + (2 + 1 - 1) / 3) / 4)
    assert found["score"] == pytest.approx(10 / 9)
    # shorter: first (wrong), and of the last a third, right; longer: two right, and of the last a third (2nd over 3rd), wrong
    assert found["accuracy_of_shorter"] == pytest.approx((1 / 3) / (1 + 1 / 3))
    assert found["accuracy_of_longer"] == pytest.approx(2 / (2 + 1 / 3))
    assert found["moved_alone"] == 0
    swapped = [RankedExample(one.prompt, one.replies, [-rank for rank in one.ranks]) for one in examples]
    other = figures(swapped, scores, scores[:4])
    assert other["accuracy"] == pytest.approx(1 - found["accuracy"])
    assert other["margin"] == pytest.approx(-found["margin"])
    assert other["length_correlation"] == found["length_correlation"]
    assert figures(examples, scores, scores[:4] + torch.tensor([0, 0, 0, 0.25]))["moved_alone"] == 0.25


# ---- the gate --------------------------------------------------------------------------------------------------------


def test_ppo_wants_a_reward_model_that_is_better_than_a_coin(world, tmp_path):
    log, weak, good = tmp_path / "log", tmp_path / "weak", tmp_path / "good"
    noise = write(tmp_path / "noise.jsonl", random_rows(40, seed=2))
    assert run("rm", flags("rm", world, weak, data__eval=noise), log) == 0, log.read_text()
    result = result_of(weak)
    assert result["eval/accuracy_low"] < 0.5 < result["eval/accuracy_high"]
    more = {"schedule__length": 1, "data__eval": "null", "critic": "zero"}
    assert run("ppo", flags("ppo", world, tmp_path / "refused", reward=weak, **more), log) == 1
    assert f"reward.source {weak}: no better than a coin" in log.read_text()
    assert f"(95%: {result['eval/accuracy_low']:.3f} to" in log.read_text()
    assert run("ppo", flags("ppo", world, tmp_path / "refused", reward=weak / "model", **more), log) == 1
    assert run("ppo", flags("ppo", world, tmp_path / "forced", reward=weak, reward__gate="false", **more), log) == 0
    longer = {"schedule__length": 30, "optimizer__lr": 1e-2, "checkpoint__every": 0}
    assert run("rm", flags("rm", world, good, **longer), log) == 0, log.read_text()
    assert result_of(good)["eval/accuracy_low"] > 0.5
    assert run("ppo", flags("ppo", world, tmp_path / "passed", reward=good, **more), log) == 0, log.read_text()


def test_held_out_ties_alone_are_refused(world, tmp_path):
    ties = write(tmp_path / "ties.jsonl", [{"prompt": "a", "chosen": " b", "rejected": " c", "tie": True}])
    assert run("rm", flags("rm", world, tmp_path / "rm", data__eval=ties), tmp_path / "log") == 65
    assert "every pair is a tie" in (tmp_path / "log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("learnable", [True, False])
def test_f2_what_can_be_learned_is_and_what_cannot_is_not(learnable, world, tmp_path):
    rows = random_rows(600, seed=3)
    for row in rows if learnable else ():
        row["responses"] = [f" a{row['responses'][0]}", f" h{row['responses'][1]}"]
    train, held_out = write(tmp_path / "train.jsonl", rows[:300]), write(tmp_path / "held_out.jsonl", rows[300:])
    more = {"data": train, "data__eval": held_out, "schedule__length": 150, "optimizer__lr": 5e-3, "checkpoint__every": 0,
            "batch_size": 30, "micro_batch_size": 30}  # fmt: skip
    assert run("rm", flags("rm", world, tmp_path / "rm", **more), tmp_path / "log") == 0
    result, last = result_of(tmp_path / "rm"), [line for line in metrics(tmp_path / "rm") if "loss" in line][-1]
    if learnable:
        assert result["eval/accuracy"] == last["accuracy"] == 1.0
    else:
        assert result["eval/accuracy_low"] < 0.5 < result["eval/accuracy_high"]
