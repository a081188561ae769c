"""What users of other tools complained about most, and the tests here that would fail if we did the same.

docs/troubleshooting.md says to a user what this table says to us. The forty are those of a survey of issue trackers (TRL,
OpenRLHF, DeepSpeed-Chat, trlX, LLaMA-Factory, verl, ms-swift and others), in its order.
"""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

TESTS = Path(__file__).parent

GUARDS: dict[str, tuple[str, ...]] = {
    "1 head lost or drawn at random": (
        "models/test_load_save.py::e4_a_missing_head_is_an_error_naming_the_tensor",
        "models/test_load_save.py::e5_head_is_drawn_with_the_root",
        "stages/test_reward_models.py::a_scale_is_kept_by_the_next_run_and_by_convert",
    ),
    "2 padding and positions": (
        "models/test_trunk.py::a_batch_is_its_rows",
        "models/test_trunk.py::rows_that_saw_each_other_would_be_found",
        "functional/test_masked.py::e2_last_index_by_mask_wherever_the_pads_are",
        "stages/test_unit_test_mode.py::a_planted_fault_is_named",
    ),
    "3 the end token is the pad token": (
        "faults/test_planted_faults.py::2_pad_is_eos",
        "faults/test_tokenizers.py::eos_is_learned_where_it_is_pad",
        "functional/test_masked.py::e2_score_position_when_the_text_holds_the_pad_id",
        "data/test_templates.py::f5_only_replies_and_their_eos_are_trained",
    ),
    "4 another tokenizer for the reward model": (
        "faults/test_tokenizers.py::a_reward_model_that_reads_other_words_is_given_text",
        "faults/test_tokenizers.py::ppo_refuses_a_tokenizer_that_is_not_the_actors",
        "rollout/test_reward_sources.py::the_critic_cannot_start_from_another_tokenizer",
    ),
    "5 two BOS, a template twice": (
        "data/test_templates.py::f6_one_bos",
        "faults/test_tokenizers.py::a_tokenizer_swapped_between_stages_is_refused",
    ),
    "6 one index off": (
        "functional/test_rewards.py::a5_the_score_is_on_the_last_response_token",
        "functional/test_masked.py::a7_masked_positions_do_not_leak",
        "functional/test_ppo.py::a7_masked_positions_change_no_loss_gradient_or_metric",
    ),
    "7 KL negative or exploding": (
        "functional/test_ppo.py::c5_mixed_temperatures_fail_the_first_minibatch",
        "faults/test_planted_faults.py::5_another_temperature",
        "report/test_alarms.py::the_budget_of_kl",
        "models/test_load_save.py::e7_dropout_is_off",
        "stages/test_edges.py::the_reference_is_the_actor_to_the_bit_at_any_shape",
    ),
    "8 engine and trainer disagree": (
        "training/test_parity.py::other_weights_are_found",
        "training/test_parity.py::a_logprob_that_is_off_is_found",
        "functional/test_importance.py::weights_by_hand",
    ),
    "9 the result depends on micro-batches or processes": (
        "stages/test_equivalence.py::micro_batches_of_four",
        "stages/test_equivalence.py::two_processes",
        "functional/test_masked.py::b3_whitened_over_all_ranks",
    ),
    "10 reward rises, text degrades": (
        "report/test_alarms.py::*",
        "stages/test_alarms.py::it_is_said_with_a_reply_and_recorded",
        "stages/test_alarms.py::what_should_rise_with_the_reward_and_falls",
        "report/test_verdict.py::*",
        "stages/test_reward_models.py::figures_by_hand",
    ),
    "11 a reward model no better than a coin": (
        "stages/test_reward_models.py::ppo_wants_a_reward_model_that_is_better_than_a_coin",
        "faults/test_planted_faults.py::10_shuffled_labels",
        "faults/test_planted_faults.py::6_a_reward_function_whose_sign_is_turned",
    ),
    "12 garbage from a fast engine": (
        "training/test_parity.py::another_token_is_named_with_both_logprobs",
        "rollout/test_hf_engine.py::greedy_is_generates_own",
    ),
    "13 LoRA reference or merge": (
        "models/test_adapters.py::the_reference_is_the_actor_to_the_bit",
        "models/test_adapters.py::another_base_is_refused_by_name",
        "models/test_load_save.py::an_adapter_on_a_changed_base_is_refused",
        "stages/test_merge.py::an_adapter_is_merged",
    ),
    "14 NaN": (
        "faults/test_non_finite.py::it_ends_the_run",
        "faults/test_non_finite.py::every_engine_leaves_the_last_checkpoint",
    ),
    "15 the critic starts badly": (
        "stages/test_stages.py::critic_warm_up_leaves_the_actor_as_it_was",
        "functional/test_ppo.py::explained_variance_known_cases",
        "report/test_alarms.py::what_is_compared_with_the_start",
        "models/test_load_save.py::transformers_scores_our_critic_as_we_do",
    ),
    "16 a failed reward is 0": (
        "faults/test_reward_service.py::wrong_scores_end_the_run_at_once",
        "rollout/test_reward_sources.py::no_score_is_no_zero",
        "rollout/test_no_score.py::what_it_would_have_scored_changes_nothing",
    ),
    "17 PPO cannot resume": (
        "faults/test_resume_matrix.py::goes_on_to_the_same_bits",
        "faults/test_kills.py::a_killed_run_ends_as_one_that_was_not",
    ),
    "18 a half-written checkpoint": (
        "faults/test_corruption.py::every_corruption_is_noticed_and_passed_over",
        "faults/test_crash_points.py::a_checkpoint",
        "faults/test_resume_rules.py::candidates_rule_and_winner_are_one_line",
    ),
    "19 a result that cannot be used": (
        "stages/test_stages.py::sft_then_rm_then_ppo",
        "stages/test_edges.py::the_saved_model_knows_where_to_stop",
    ),
    "20 checkpoints fill the disk": (
        "training/test_checkpoint.py::rotation_keeps_the_newest",
        "faults/test_storage.py::a_run_that_cannot_fit_does_not_begin",
    ),
    "21 versions": (
        "test_packaging.py::every_dependency_has_a_tested_version",
        "models/test_qlora.py::without_the_package_one_message",
    ),
    "22 out of memory": (
        "faults/test_out_of_memory.py::it_ends_with_an_advice_and_the_last_checkpoint",
        "faults/test_out_of_memory.py::what_cannot_fit_is_refused",
        "stages/test_plan_memory.py::the_peak_is_the_planned_one",
    ),
    "23 ranks that wait for each other": (
        "stages/test_edges.py::fewer_replies_than_ranks",
        "faults/test_ranks.py::a_rank_that_freezes",
        "stages/test_engines.py::every_mode_of_roles_with_a_reward_model",
    ),
    "24 launching on several machines": (
        "training/test_preflight.py::a_wrong_sum_is_named",
        "stages/test_machines.py::two_machines_leave_what_two_processes_leave",
        "test_docs.py::the_slurm_job_is_planned_on_both_machines",
    ),
    "25 PPO without Ray": (
        "runs/test_launch.py::one_process_on_the_cpu_is_plain_python",
        "test_docs.py::the_quickstart_and_its_python",
    ),
    "26 conversion": (
        "checkpoints/test_round_trips.py::*",
        "checkpoints/test_silent_mistakes.py::*",
        "stages/test_megatron_source.py::sft_rm_ppo_from_a_megatron_directory",
    ),
    "27 batch arithmetic": (
        "runs/test_execute.py::batches_of_ppo",
        "runs/test_execute.py::batches_of_sft",
    ),
    "28 guessing formats": (
        "data/test_rows.py::row_is_normalised",
        "data/test_rows.py::row_of_the_wrong_shape_is_refused",
        "data/test_rows.py::real_set_loads",
    ),
    "29 no recipe for the chain": (
        "runs/test_pipeline.py::it_runs_and_then_keeps_everything",
        "test_quickstart.py::the_policy_becomes_helpful",
    ),
    "30 a reward model of another kind": (
        "rollout/test_reward_sources.py::a_model_with_another_tokenizer_reads_text",
        "models/test_adapters.py::a_whole_reward_model_is_refused",
        "stages/test_edges.py::a_reward_adapter_is_no_policy",
    ),
    "31 rules, or several rewards": (
        "stages/test_rewards.py::several_sources",
        "rollout/test_verifiers.py::numeric",
    ),
    "32 modes that do not go together": (
        "stages/test_roles.py::modes_that_lora_does_not_fit",
        "stages/test_rollouts.py::options_that_do_not_go_together",
    ),
    "33 FP8 and back": (
        "stages/test_fp8.py::the_first_ratio_of_ppo_is_exactly_one",
        "stages/test_fp8.py::what_is_saved_is_a_plain_model",
    ),
    "34 slow generation": (
        "rollout/test_refill.py::the_model_sees_each_token_once_and_no_pad",
        "stages/test_engines.py::two_processes_leave_what_one_leaves",
    ),
    "35 what metrics mean": (
        "stages/test_explained.py::every_metric_is_explained",
        "runs/test_explain.py::every_check_is_explained",
        "report/test_alarms.py::every_alarm_is_explained",
    ),
    "36 samples not visible": ("report/test_page.py::*",),
    "37 trackers lose metrics": (
        "stages/test_stages.py::tensorboard_shows_what_metrics_say",
        "faults/test_resume_rules.py::metrics_repeat_no_step",
    ),
    "38 not reproducible": (
        "faults/test_resume_matrix.py::goes_on_to_the_same_bits",
        "stages/test_edges.py::lora_repeats_whatever_the_generator_held",
    ),
    "39 no evaluation during PPO": (
        "faults/test_non_finite.py::an_evaluation_that_is_not_finite",
        "test_quickstart.py::the_policy_becomes_helpful",
    ),
    "40 examples that do not run": (
        "test_docs.py::readme_commands_run",
        "test_docs.py::launching_commands_run",
        "test_docs.py::defaults_in_the_docs_are_the_schemas",
    ),
}
"""Complaint -> tests, without their `test_`; `*`: all of a file."""


@cache
def functions_of(file: str) -> set[str]:
    tree = ast.parse((TESTS / file).read_text())
    return {node.name.removeprefix("test_") for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("complaint", GUARDS)
def test_the_guards_are_there(complaint):
    for guard in GUARDS[complaint]:
        file, _, name = guard.partition("::")
        assert name in functions_of(file) | {"*"}, f"{complaint}: no test {guard}"


def test_there_are_forty():
    assert sorted(int(name.split()[0]) for name in GUARDS) == list(range(1, 41))
