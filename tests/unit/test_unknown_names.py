"""Names of other trainers that glmtune does not have: no setting is suggested for them."""

import pytest

from glmtune.config.foreign import FOREIGN
from glmtune.config.names import check_name
from glmtune.config.settings import SETTINGS
from glmtune.errors import UserError

STRANGE = {
    "LLaMA-Factory": """
        media_dir eval_on_each_dataset enable_thinking
        data_shared_file_system freeze_trainable_modules loraplus_lr_embedding
        pissa_convert oft_rank oft_target pref_ftx pref_loss kto_chosen_weight
        simpo_gamma ppo_epochs ppo_target ref_model ref_model_quantization_bit
        reward_model_quantization_bit ld_alpha galore_rank galore_scale galore_layerwise
        apollo_rank apollo_scale apollo_proj_type apollo_layerwise badam_mode
        badam_switch_mode badam_update_ratio badam_verbose swanlab_workspace
        swanlab_mode swanlab_logdir swanlab_lark_secret use_megatron_bridge
        use_hyper_parallel hyper_parallel_cp_size use_asft_loss use_eaft_loss
        freeze_vision_tower freeze_language_model adapter_folder
        new_special_tokens_config mixture_of_depths upcast_lmhead_output use_v1_kernels
        om_hub_token quantization_device_map image_min_pixels crop_to_patches
        video_min_pixels video_maxlen audio_sampling_rate export_device
        export_quantization_nsamples export_hub_model_id vllm_gpu_util
        vllm_max_lora_rank sglang_maxlen sglang_tp_size sglang_lora_backend
        kt_cpu_activation kt_non_expert_weight_path kt_use_lora_experts
        kt_lora_expert_intermediate_size ray_num_workers enable_torch_profiler
        profiler_wait_steps profiler_active_steps
    """,
    "ChatGLM-Efficient-Tuning": """
        load_from dataset_sha1 num_layer_trainable name_module_trainable
    """,
    "MedicalGPT": """
        hf_hub_model_id single_tune
    """,
    "ptuning": """
        forced_bos_token
    """,
    "qlora": """
        mmlu_split mmlu_dataset do_mmlu_eval max_mmlu_samples mmlu_source_max_len
        max_memory_MB num_beam_groups diversity_penalty tokenizer
    """,
    "ChatGLM-Finetuning": """
        freeze_module_name
    """,
    "axolotl": """
        cls_model_config tokenizer_use_mistral_common processor_kwargs
        experimental_skip_move_to_device model_quantization_config use_onebitllms
        eos_token unk_token loftq_bits lora_rank_pattern peft_layers_to_transform peft
        peft_init_lora_weights peft_ensure_weight_tying qlora_sharded_model_loading gptq
        merge_lora relora_prune_ratio relora_cpu_offload modules save_sliding_window
        offload embedding_lr_scale lr_quadratic_warmup cosine_constant_lr_ratio
        lr_groups dion_momentum dion_rank_multiple_of qgalore_update_proj_gap
        qgalore_proj_type qgalore_proj_bits qgalore_cos_threshold qgalore_queue_size
        jagged_restart_warmup_steps feature_layers use_whitening diversity_coef
        adaptive_max_tokens stride generate_max_len rl_coef min_completion_prefix
        mean_resizing_embeddings embeddings_skip_upcast trainer_cls vllm qat
        dynamic_checkpoint center_rewards_coefficient dpo_use_weighting
        dpo_use_liger_kernel dpo_loss_type shuffle_merged_datasets dataset_shard_num
        skip_prepare_dataset pretraining_dataset dataset_keep_in_memory ddp
        eval_causal_lm_metrics bench_dataset loss_watchdog_threshold gc_steps
        selective_checkpointing layer_offloading unfrozen_parameters min_sample_len
        sample_packing_group_size sample_packing_sequentially curriculum_sampling
        batch_flattening pose_split_on_token_ids pose_num_chunks pretrain_multipack_attn
        streaming_multipack_buffer_size flex_attn_compile_kwargs flash_attn_fuse_mlp
        sage_attention large_head_attention sdpa_varlen experts_implementation
        scaling_softmax scaling_softmax_bias chunked_cross_entropy use_eaft tiled_mlp
        tiled_mlp_use_original_mlp deepcompile fp32_norms fsdp_final_state_dict_type
        dp_replicate_size
    """,
    "PEFT": """
        ephemeral_gpu_offload scale loftq_iter use_gks gks_adapter_names
        target_modules_bd_a nblocks rho use_label_mask whiten beta cache_file
        corda_method use_float16_for_covariance exclude_modules megatron_config
        trainable_token_indices corda_config velora_config use_qalora monteclora_config
        runtime_config use_bdlora kasa_config direction
    """,
    "ms-swift": """
        tuner_backend custom_register_path enable_npu_model_patch load_data_args
        packing_num_proc lazy_tokenize ignore_args_error cached_dataset
        load_from_cache_file shuffle_buffer_size columns model_author
        logprobs structured_outputs_regex new_special_tokens max_model_len init_strategy
        bnb_4bit_quant_storage agent_template use_chat_template padding_free
        sequence_parallel_size template_backend add_non_thinking_prefix swanlab_token
        swanlab_notification_method swanlab_secret swanlab_receiver_email
        swanlab_smtp_port add_version zero_hpz_partition_size freeze_parameters
        freeze_parameters_ratio trainable_parameters_regex freeze_vit target_regex
        lorap_lr_ratio lora_ga_iters lora_ga_direction lora_ga_stable_gamma
        fourier_n_frequency boft_block_size boft_n_butterfly_factor vera_rank
        vera_dropout adapter_act adalora_target_r adalora_tinit adalora_deltaT
        adalora_beta2 llamapro_num_new_blocks reft_layer_key reft_rank reft_args
        lmdeploy_session_len lmdeploy_quant_policy sglang_pp_size sglang_ep_size
        sglang_mem_fraction_static
    """,
}


@pytest.mark.parametrize("project", STRANGE)
def test_a_name_that_is_not_ours_gets_no_wrong_guess(project):
    assert sum(len(names.split()) for names in STRANGE.values()) >= 200
    for name in STRANGE[project].split():
        assert name not in FOREIGN
        for verb in SETTINGS:
            with pytest.raises(UserError) as told:
                check_name(verb, name, f"--{name}")
            help_line = f"`glmtune {verb} --help` lists its settings"
            assert str(told.value) == f"--{name} is not a setting of {verb}; {help_line}"
