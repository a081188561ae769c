"""Configs and command lines that are wrong, each with what is said of it.

Places are counted by hand: the cases of a file stand after GOOD, from line 5 on.
"""

from __future__ import annotations

from importlib.util import find_spec

GOOD = """\
output: runs/ppo
roles: {actor: sft}
data: {train: prompts.jsonl}
reward: {source: rm}
"""
"""The required fields of a PPO run, in four lines; the cases below go on at line 5."""

BAD_VALUES = [
    # booleans are true and false, nothing else
    ("lora:\n  merge: yes\n", "6:10: lora.merge", "given `yes`, expected true or false; write `true`"),
    ("lora: {merge: no}\n", "5:15: lora.merge", "write `false`"),
    ("lora: {merge: True}\n", "5:15: lora.merge", "write `true`"),
    ("lora: {merge: 1}\n", "5:15: lora.merge", "write `true`"),
    ("lora: {merge: maybe}\n", "5:15: lora.merge", "leave it out for the default false"),
    # whole numbers are written whole
    ("seed: 1.0\n", "5:7: seed", "given `1.0`, expected a whole number, at least 0"),
    ("seed: 1.0\n", "5:7: seed", "write `1`"),
    ("micro_batch_size: 1e3\n", "5:19: micro_batch_size", "write `1000`"),
    ("micro_batch_size: 0.5\n", "5:19: micro_batch_size", "leave it out for the default 8"),
    ("micro_batch_size: 0\n", "5:19: micro_batch_size", "expected a whole number, at least 1"),
    ("micro_batch_size: " + "9" * 5000 + "\n", "5:19: micro_batch_size", "expected a whole number"),
    ("seed: -1\n", "5:7: seed", "given `-1`, expected a whole number, at least 0"),
    ("seed: 9223372036854775808\n", "5:7: seed", "below 9223372036854775808"),
    ("threads: many\n", "5:10: threads", "given `many`"),
    # numbers and their ranges
    ("ppo:\n  epochs: 2\n  clip: abc\n", "7:9: ppo.clip", "given `abc`, expected a number, above 0"),
    ("ppo: {clip: -0.2}\n", "5:13: ppo.clip", "leave it out for the default 0.2"),
    ("ppo: {gamma: 1.5}\n", "5:14: ppo.gamma", "expected a number, from 0 to 1"),
    ("ppo: {clip: nan}\n", "5:13: ppo.clip", "given `nan`"),
    ("ppo: {value_clip: inf}\n", "5:19: ppo.value_clip", "expected a number, above 0, or none"),
    ("max_hours: 3h\n", "5:12: max_hours", "given `3h`"),
    ("lora: {dropout: 1}\n", "5:17: lora.dropout", "at least 0 and below 1"),
    ("kl: {coef: [0.1]}\n", "5:12: kl.coef", "given a list"),
    ("kl: {coef: {start: 0.1}}\n", "5:6: kl.coef", "given a section of fields"),
    # choices
    ("precision: fp16\n", "5:12: precision", "expected `fp64`, `fp32` or `bf16`; leave it out for the default fp32"),
    ("precision: Fp32\n", "5:12: precision", "did you mean `fp32`?"),
    ("schedule: {unit: tokens}\n", "5:18: schedule.unit", "expected `steps` or `epochs`"),
    # no value where one is needed
    ("seed:\n", "5:6: seed", "given nothing"),
    ("seed: null\n", "5:7: seed", "given `null`"),
    ("ppo: {clip: ~}\n", "5:13: ppo.clip", "given `~`"),
    ("lora: {targets: none}\nseed: none\n", "6:7: seed", "given `none`"),
    ("precision: null\n", "5:12: precision", "given `null`"),
    # shapes
    ("ppo:\n", "5:5: ppo", "given nothing, expected the fields of a section (epochs,"),
    ("ppo:\n# epochs: 2\nseed: 0\n", "5:5: ppo", "leave it out for the defaults"),
    ("kl: 0.1\n", "5:5: kl", "given `0.1`, expected the fields of a section"),
    ("kl: [coef]\n", "5:5: kl", "given a list"),
    ("eval: {scorers: file.py:score}\n", "5:17: eval.scorers", "expected a list of text; write `[file.py:score]`"),
    ("report: {trackers: [tensorboard, comet]}\n", "5:34: report.trackers[1]", "expected `tensorboard`"),
    ("report:\n  trackers:\n    - Tensorboard\n", "7:7: report.trackers[0]", "did you mean `tensorboard`?"),
    # what YAML offers and a config does not
    ("lora: &a {rank: 4}\n", "5:7: lora", "anchor `&a`"),
    ("lora: &a {rank: 4}\nkl: *a\n", "6:5: kl", "alias `*a`: write the value itself"),
    ("seed: !!int 3\n", "5:7: seed", "tag `tag:yaml.org,2002:int`"),
    ("seed: !!python/object/apply:os.getpid []\n", "5:7: seed", "python/object/apply:os.getpid`: leave it out"),
    ("seed: 1\nthreads: 1\nseed: 2\n", "7:1: seed", ":5:1; keep one"),
    ("kl: {coef: 1, coef: 2}\n", "5:15: kl.coef", "given twice"),
    ("? [a, b]\n: 1\n", "5:3", "a field's name is plain text, not a list"),
    ("---\nseed: 1\n", "5:1", "a second document"),
    # unknown fields
    ("kl: {coeff: 1}\n", "5:6: kl.coeff", "unknown field; did you mean `kl.coef`?"),
    ("rolout:\n  batch_size: 2\n", "5:1: rolout", "did you mean `rollout`?"),
    ("gamma: 1\n", "5:1: gamma", "did you mean `ppo.gamma`?"),
    ("batch_size: 4\n", "5:1: batch_size", "did you mean `micro_batch_size`, `rollout.batch_size` or `ptx.batch_size`?"),
    ("ppo: {temperature: 1}\n", "5:7: ppo.temperature", "did you mean `rollout.temperature` or `eval.temperature`?"),
    ("model: {path: gpt}\n", "5:1: model", "it belongs to sft and rm"),
    ("kl.coef: 0.1\n", "5:1: kl.coef", "sections nest: write `coef:` under `kl:`"),
    (
        "kl: {xyzzy: 1}\n",
        "5:6: kl.xyzzy",
        "known here: coef, estimator, place, controller, target, horizon, refresh_every, refresh_keep",
    ),
    # fields that do not go together, at the field the schema's message names first, else at their section
    ("ppo:\n  minibatch_size: 65\n", "6:19", "ppo.minibatch_size 65 is more than the 64 replies"),
    ("ppo:\n  minibatch_size: 24\n", "6:19", "24 does not divide the 64 replies of an iteration"),
    ("rollout: {batch_size: 8}\n", "1:1", "ppo.minibatch_size 64 is more than the 8 replies"),
    ("lora: {rank: 8, dropout: 0.1}\n", "5:26", "lora.dropout must be 0"),
    ("lora: {rank: 8}\nfrozen_layers: 1\n", "6:16", "frozen_layers must be 0 with lora.rank > 0"),
    ("lora: {dora: true}\n", "5:14", "lora.dora has no meaning with lora.rank 0"),
    ("lora: {base: nf4}\n", "5:14", "lora.base has no meaning with lora.rank 0"),
    ("lora: {rank: 8, base: nf4}\nfp8: {recipe: block}\n", "6:15", "fp8.recipe must be `none` with lora.base `nf4`"),
]

BAD_FLAGS = [
    (("ppo.clip", "abc"), "--ppo.clip: given `abc`, expected a number, above 0; leave it out for the default 0.2"),
    (("ppo.value-clip", "-1"), "--ppo.value-clip: ppo.value_clip: given `-1`, expected a number, above 0, or none"),
    (("ppo.whiten", "yes"), "--ppo.whiten: given `yes`, expected true or false; write `true`"),
    (("seed", "1.0"), "--seed: given `1.0`, expected a whole number"),
    (("output", "null"), "--output: given `null`, expected text"),
    (("output", ""), "--output: given nothing, expected text"),
    (("actor", ""), "--actor: roles.actor: given nothing, expected text"),
    (("reference", ""), "--reference: roles.reference: given nothing, expected text, or none"),
    (("max-hours", ""), "--max-hours: max_hours: given nothing, expected a number, above 0, or none"),
    (("report.trackers", "tensorboard,comet"), "--report.trackers: report.trackers[1]: given `comet`"),
    (("data.columns.prompt", "null"), "--data.columns.prompt: given `null`, expected text"),
    (("data.columns", "a"), "--data.columns: names a section; give one of its fields: --data.columns.NAME"),
    (("ppo", "1"), "--ppo: names a section; give one of its fields: --ppo.epochs, --ppo.minibatch_size"),
    (("ppo.clip.low", "1"), "--ppo.clip.low: unknown flag; did you mean `--ppo.clip`?"),
    (("ppo.clpi", "1"), "--ppo.clpi: unknown flag; did you mean `--ppo.clip`?"),
    (
        ("rolout.batch-size", "1"),
        "--rolout.batch-size: unknown flag; did you mean `--rollout.batch_size` or `--ptx.batch_size`?",
    ),
    (("clip", "1"), "--clip: unknown flag; did you mean `--reward.clip` or `--ppo.clip`?"),
    (("model", "gpt"), "--model: unknown flag; it belongs to sft and rm"),
    (("xyzzy", "1"), "--xyzzy: unknown flag; --help lists them all"),
    (("ppo.minibatch_size", "100"), "--ppo.minibatch_size: ppo.minibatch_size 100 is more than the 64 replies"),
]

UNREADABLE = [
    (b"", "1:1: expected `field: value` lines, found nothing"),
    (b"# only words\n", "2:1: expected `field: value` lines, found nothing"),
    (b"---\n", "found nothing"),
    (b"- output: x\n", "1:1: expected `field: value` lines, found a list"),
    (b"ppo\n", "1:1: expected `field: value` lines, found `ppo`"),
    (b"output: a: b\n", "1:10: not YAML: mapping values are not allowed"),
    (b"kl:\n\tcoef: 1\n", "2:1: not YAML: found character that cannot start any token; indent with spaces"),
    (b"kl: {coef: 1\nseed: 1\n", "not YAML"),
    (b"output: \x07\n", "1:9: not a text file: it holds the control character U+0007"),
    (b"seed: 1\noutput: \xff\n", "2:9: not UTF-8 text"),
    (b"kl: " + b"[" * 900 + b"]" * 900, "1:21: nested more than 16 deep"),
]

BAD_WORDS = [
    (["runs/ppo"], "`runs/ppo`: expected a flag"),
    (["--output", "a", "b"], "`b`: expected a flag"),
    (["-o", "a"], "`-o`: expected a flag"),
    (["--"], "`--`: expected a flag"),
    (["--output"], "--output: the value is missing; expected text"),
    (["--output", "--seed", "1"], "--output: the value is missing"),
    (["--ppo.clip"], "--ppo.clip: the value is missing; expected a number, above 0"),
    (["--config"], "--config: the value is missing; expected NAME|FILE"),
    (["--dry-run=true"], "--dry-run: takes no value"),
    (["--num-machines", "x"], "--num-machines: given `x`, expected a whole number, at least 1"),
    (["--num-machines=2"], "--main-address: given ``, expected HOST or HOST:PORT"),
    (["--num-machines=2", "--main-address=a:b"], "--main-address: given `a:b`, expected HOST or HOST:PORT"),
    (["--num-machines=2", "--main-address=a", "--machine-rank=2"], "--machine-rank: given 2, expected 0 to 1"),
    (["--machine-rank=0"], "--machine-rank: has no meaning on one machine; give --num-machines"),
    (["--nproc", "0"], "--nproc: given `0`, expected a whole number, at least 1"),
    (["--nproc=two"], "--nproc: given `two`"),
    (["--config", "a.yaml", "--config", "b.yaml"], "--config: given twice"),
]


# stage, what follows its required flags, what the message says; a word `@NAME` is a file that holds FILES[NAME]
STAGE_CASES = [
    ("sft", ["--optimizer.lr=0"], "--optimizer.lr: given `0`, expected a number, above 0"),
    ("sft", ["--optimizer.lr=1e-5x"], "--optimizer.lr: given `1e-5x`, expected a number"),
    ("sft", ["--optimizer.beta2=1"], "--optimizer.beta2: given `1`, expected a number, at least 0 and below 1"),
    ("sft", ["--schedule.warmup=1.0"], "--schedule.warmup: given `1.0`"),
    ("sft", ["--batch_size=0"], "--batch_size: given `0`, expected a whole number, at least 1"),
    ("sft", ["--seed=1_000"], "--seed: given `1_000`, expected a whole number"),
    ("sft", ["--data.max_length=1"], "--data.max_length: given `1`, expected a whole number, at least 2"),
    ("sft", ["--data.max_skip_fraction=1.5"], "--data.max_skip_fraction: given `1.5`, expected a number, from 0 to 1"),
    ("sft", ["--data.on_error=skipp"], "--data.on_error: given `skipp`, expected `fail` or `skip`; did you mean `skip`?"),
    ("sft", ["--data.too_long=split"], "--data.too_long: data: too_long may be `split` for plain text only"),
    ("sft", ["--data.columns.promt=q"], "data.columns.promt: no field of sft data (did you mean 'prompt'?)"),
    ("rm", ["--data.columns.chosen=a", "--data.columns.rejected=a"], "data.columns: two fields are read from one column"),
    ("rm", ["--data.json_key=text"], "--data.json_key: unknown flag"),
    ("ppo", ["--data.columns.answer=a"], "data.columns.answer: no field of prompt data"),
    ("sft", ["--model.from_scratch", "--lora.rank=4"], "lora.merge must be true with model.from_scratch"),
    ("sft", ["--compile", "--fp8.recipe=block"], "compile must be false with fp8.recipe other than `none`"),
    ("sft", ["--precision=fp64", "--fp8.recipe=block"], "fp8.recipe must be `none` with precision `fp64`"),
    ("sft", ["--fp8.recipe=block", "--fp8.margin=1"], "margin has no meaning with recipe block"),
    ("sft", ["--fp8.recipe=block", "--fp8.probe.every=5"], "steps 100 must be at most every 5"),
    ("dpo", ["--loss.kind=ipo", "--loss.gamma=2"], "gamma has no meaning with kind ipo, only with simpo"),
    ("dpo", ["--loss.kind=orpo", "--loss.beta=0.2"], "beta has no meaning with kind orpo, only with dpo, ipo, simpo"),
    ("dpo", ["--loss.kind=simpo", "--reference=other"], "model.reference has no meaning with loss.kind simpo"),
    ("dpo", ["--loss.label_smoothing=0.5"], "loss.label_smoothing: given `0.5`, expected a number, at least 0 and below 0.5"),
    ("dpo", ["--lora.rank=4", "--lora.dropout=0.1"], "lora.dropout must be 0 in DPO"),
    ("kto", ["--lora.rank=4", "--lora.dropout=0.1"], "lora.dropout must be 0 in KTO"),
    ("kto", ["--data.columns.answer=a"], "data.columns.answer: no field of rated data"),
    ("ppo", ["--roles.mode=adapters"], "lora.rank must be more than 0 with roles.mode `adapters`"),
    ("ppo", ["--roles.mode=shared", "--critic=other"], "roles.critic must be `zero` (or absent) with roles.mode `shared`"),
    ("ppo", ["--kl.coef=-0.1"], "--kl.coef: given `-0.1`, expected a number, at least 0"),
    ("ppo", ["--unit-test", "--precision=bf16"], "precision: the unit test compares numbers closer than bf16"),
    ("ppo", ["--unit-test", "--fp8.recipe=block"], "fp8.recipe: the unit test compares numbers closer than FP8"),
    ("sft", ["--trust-remote-code", "--model=somebody/model"], "trust_remote_code: somebody/model must be pinned"),
    ("sft", ["--trust-remote-code=yes"], "--trust-remote-code: trust_remote_code: given `yes`, expected true or false"),
    ("sft", ["--model=https://me:word@host/m"], "--model: model.path: holds a secret"),
    ("sft", ["--config=xyzzy"], "xyzzy: no such config; give one of"),
    ("sft", ["--config=@nul"], ":1:9: output: holds a NUL character"),
    ("sft", ["--config=@ppo"], ":2:1: roles: unknown field; it belongs to ppo"),
    # how to launch
    ("sft", ["--launch=xyzzy"], "--launch xyzzy: no file"),
    ("sft", ["--launch=gpu", "--nproc=2"], "starts one process, --nproc asks for 2"),
    ("sft", ["--launch=zero1", "--precision=fp64"], "precision fp64: DeepSpeed keeps its state in float32"),
    ("ppo", ["--launch=fsdp", "--frozen_layers=1"], "frozen_layers must be 0 in PPO with fsdp"),
    ("ppo", ["--launch=zero3", "--lora.rank=4", "--lora.base=nf4"], "lora.base must be `plain` with zero3"),
    ("sft", ["--launch=zero2", "--fp8.recipe=block", "--fp8.probe.every=100"], "fp8.probe.every must be 0 with ZeRO"),
    ("sft", ["--num-machines=2", "--main-address=a", "--nproc=3"], "--nproc: 3 processes do not divide among 2 machines"),
    ("sft", ["--launch=multinode"], "2 machines and no main_process_ip"),
    ("sft", ["--launch=@text"], "num_processes: given 'two', expected a valid integer"),
    ("sft", ["--launch=@several"], "num_processes: given -1"),
    ("sft", ["--launch=@several"], "main_process_port: given 99999, expected less than 65536"),
    ("sft", ["--launch=@several"], "distributed_type: given 'MEGATRON_LM', expected NO, MULTI_GPU, DEEPSPEED or FSDP"),
    ("sft", ["--launch=@typo"], "num_proceses: unknown; did you mean num_processes?"),
    ("sft", ["--launch=@rank"], "machine_rank 7: expected 0 to 1"),
    ("sft", ["--launch=@fp16"], "mixed_precision is fp16; precision belongs to the stage's config"),
    ("sft", ["--launch=@list"], "not an Accelerate config"),
    ("sft", ["--launch=@tag"], "not valid YAML: could not determine a constructor"),
    ("sft", ["--launch=@deep"], "not valid YAML"),
    ("sft", ["--launch=@bytes"], "not valid YAML"),
    ("sft", ["--launch=@mpi"], "Accelerate would start one process without mpirun"),
    ("sft", ["--launch=@nowhere"], "deepspeed_config_file nowhere.json: no such file"),
    ("sft", ["--launch=@stage", "--nproc=2"], "has zero_optimization.stage 7, expected 1, 2 or 3"),
    ("sft", ["--launch=@optimizer", "--nproc=2"], "sets optimizer, which belongs to the stage's config"),
]

PACKAGE_CASES = [
    ("transformer_engine", ["--fp8.recipe=block", "--fp8.backend=te"], "fp8.backend te: transformer_engine is not installed"),
    ("bitsandbytes", ["--lora.rank=4", "--lora.base=nf4"], "lora.base: `nf4` needs the package bitsandbytes"),
    ("deepspeed", ["--launch=zero2", "--nproc=2"], "the launch file asks for DeepSpeed, which is not installed"),
]
STAGE_CASES += [("sft", words, message) for package, words, message in PACKAGE_CASES if find_spec(package) is None]

FILES: dict[str, bytes] = {
    "nul": b'output: "a\\0b"\nmodel: {path: m}\ndata: {train: t}\n',
    "ppo": b"output: o\nroles: {actor: a}\nmodel: {path: m}\ndata: {train: t}\n",
    "text": b"num_processes: two\n",
    "several": b"num_processes: -1\nmain_process_port: 99999\ndistributed_type: MEGATRON_LM\n",
    "typo": b"num_proceses: 4\ndistributed_type: MULTI_GPU\n",
    "rank": b"num_machines: 2\nmachine_rank: 7\nmain_process_ip: a\nnum_processes: 2\ndistributed_type: MULTI_GPU\n",
    "fp16": b"mixed_precision: fp16\n",
    "list": b"- 1\n",
    "tag": b"num_processes: !!python/object/apply:os.getpid []\n",
    "deep": b"a: " + b"[" * 500 + b"]" * 500,
    "bytes": b"\xff\xfe",
    "mpi": b"distributed_type: MULTI_CPU\nnum_processes: 2\n",
    "nowhere": b"distributed_type: DEEPSPEED\ndeepspeed_config: {deepspeed_config_file: nowhere.json}\n",
    "stage": b"distributed_type: DEEPSPEED\ndeepspeed_config: {deepspeed_config_file: stage.json}\n",
    "optimizer": b"distributed_type: DEEPSPEED\ndeepspeed_config: {deepspeed_config_file: optimizer.json}\n",
}
DEEPSPEED_FILES = {
    "stage.json": b'{"zero_optimization": {"stage": 7}}',
    "optimizer.json": b'{"zero_optimization": {"stage": 2}, "optimizer": {"type": "AdamW"}}',
}
