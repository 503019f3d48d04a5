"""The table of all keys of an AI Toolkit job, and how each is converted.

Names and defaults are those of its classes at version 0.12.26 (ostris/ai-toolkit 27a03a9), not those of its web form.
"""

from zimage_train.compat.aitoolkit.rules import (
    OFF,
    HandledHere,
    Mapped,
    Refused,
    Row,
    WithoutEffect,
    anything,
    flag,
    guidance_schedule,
    loss_type,
    number,
    one_of,
    rows,
    section,
    text,
    texts,
    whole,
)

_FLOAT_TYPES = {"bf16": "bf16", "bfloat16": "bf16", "fp32": "fp32", "float32": "fp32", "float": "fp32"}
DTYPES = _FLOAT_TYPES | {"fp16": "fp16", "float16": "fp16", "half": "fp16"}
"""AI Toolkit's names of dtypes. There is no fp16 here; sections.py converts it to bf16."""

PLANNER = "the planner fits the run to the card; see memory and model.quantize"
LOGS = "a run keeps its own logs, in its folder"
CACHES = "latents and text are always cached, in cache.folder"
STILL = "Z-Image draws single images"
CONTROL = "Z-Image has no control images"
_OTHER_MODELS = WithoutEffect("is for other models")
_NOISE = Refused("changes the noise, which is not possible here")
_LOSS = Refused("changes the loss, which is not possible here")
_SNR = Refused("stops AI Toolkit too: it needs the noise schedule of DDPM", "set loss.min_snr in the imported config")
_SCALE = Refused("scales what the model sees, which is not possible here", neutral=(1, 1.0))

FILE: dict[str, Row] = {
    "job": Refused("only training jobs are read", "give a job: extension", ("extension", "train")),
    "meta": HandledHere("LoRA files carry the metadata of zimage-train"),
    "config.name": Mapped("name", text, remark="may not end in a hyphen and digits", derived=True),
    "config.process": Mapped("", anything, remark="one process only", derived=True),
    "config.device": HandledHere("CUDA_VISIBLE_DEVICES chooses the card", ("cuda", "cuda:0")),
}

PROCESS: dict[str, Row] = {
    "type": Refused(
        "only its trainer of LoRAs is read",
        "give a job of type sd_trainer, diffusion_trainer or ui_trainer",
        ("sd_trainer", "diffusion_trainer", "ui_trainer"),
    ),
    "name": Mapped("name", text, remark="wins over config.name", derived=True),
    "training_folder": Mapped("output_dir", text),
    "training_seed": Mapped("seed", whole, remark="left out: random there, 42 here"),
    "trigger_word": Mapped("data[].trigger", text, remark="for datasets without their own", derived=True),
    "device": HandledHere("CUDA_VISIBLE_DEVICES chooses the card", ("cuda", "cuda:0")),
    **rows("", HandledHere(LOGS), "log_dir sqlite_db_path performance_log_every torch_profiler"),
    "first_sample": Refused("gives the first previews settings of their own", "leave it out; all previews are alike"),
    **rows("", Refused("trains something else than a LoRA"), "guidance embedding decorator adapter slider do_lorm"),
    **rows("", WithoutEffect("is used with do_lorm only"), "lorm_extract_mode lorm_extract_mode_param"),
}

LOGGING: dict[str, Row] = {
    **rows("logging", HandledHere(LOGS), "log_every verbose use_ui_logger run_name"),
    "logging.use_wandb": Mapped("log.wandb", flag, False, derived=True),
    "logging.project_name": Mapped("log.wandb", text, "ai-toolkit", derived=True),
}

NETWORK: dict[str, Row] = {
    "network.type": Mapped("lora.type", one_of({"lora": "lora", "lokr": "lokr", "dora": "dora"}), "lora"),
    "network.linear": Mapped("lora.rank", whole, 4, derived=True),
    "network.rank": Mapped("lora.rank", whole, remark="wins over linear", derived=True),
    **rows("network", WithoutEffect("alpha is the rank there, and here"), "linear_alpha alpha"),
    **rows("network", WithoutEffect("Z-Image has no convolutions"), "conv conv_alpha"),
    "network.dropout": Mapped(
        "lora.dropout", number, 0.0, "there on the rank of a LoRA, here on its inputs, as in peft", derived=True
    ),
    "network.transformer_only": Mapped("lora.targets", flag, True, "false: all 276 linear modules", derived=True),
    "network.network_kwargs.ignore_if_contains": Mapped("lora.targets", texts, (), derived=True),
    "network.network_kwargs.only_if_contains": Mapped("lora.targets", texts, (), derived=True),
    **rows("network.network_kwargs", Refused("is not possible here"), "full_if_contains parameter_threshold"),
    "network.network_kwargs.rank_dropout": Mapped("lora.rank_dropout", number, 0.0, "of a LoRA", derived=True),
    "network.network_kwargs.module_dropout": Refused("stops AI Toolkit", "set lora.module_dropout in its place"),
    "network.network_kwargs.target_lin_modules": WithoutEffect("the model sets it"),
    "network.lokr_full_rank": Mapped("lora.rank", flag, True, "of a LoKr; true: its matrices are whole", derived=True),
    "network.lokr_factor": Mapped("lora.factor", whole, -1, "of a LoKr; -1 is auto", derived=True),
    "network.old_lokr_format": HandledHere("a LoKr has the newer keys, which ComfyUI and diffusers read"),
    "network.split_multistage_loras": WithoutEffect("is for models of two stages", (True,)),
    "network.layer_offloading": WithoutEffect("is not finished there"),
    "network.pretrained_lora_path": Mapped("lora.init_from", text),
    **rows("network", Refused("trains something else than a LoRA or LoKr"), "all_layers lorm"),
}

SAVE: dict[str, Row] = {
    "save.save_every": Mapped("save.every", whole, 1000),
    "save.max_step_saves_to_keep": Mapped("save.keep", whole, 5),
    "save.dtype": Mapped("save.dtype", one_of(DTYPES), "fp16", "float16 becomes bf16, which is as large", derived=True),
    "save.save_format": WithoutEffect("is for models trained in full", ("safetensors", "diffusers")),
    "save.push_to_hub": Refused("training uploads nothing", "zimage-train publish RUN --to ORG/REPO does"),
    **rows("save", WithoutEffect("is used with push_to_hub only"), "hf_repo_id hf_private"),
}

TRAIN: dict[str, Row] = {
    # How long, and how
    "train.steps": Mapped("train.steps", whole, 1000),
    "train.batch_size": Mapped("train.batch_size", whole, 1),
    "train.gradient_accumulation": Mapped(
        "train.grad_accumulation", whole, 1, "gradients are averaged here and added up there", derived=True
    ),
    "train.gradient_accumulation_steps": Refused(
        "AI Toolkit forgets the gradients between its passes", "use gradient_accumulation", (0, 1)
    ),
    "train.max_grad_norm": Mapped("train.max_grad_norm", number, 1.0, "none for adafactor, as there", derived=True),
    "train.dtype": Mapped("model.dtype", one_of(DTYPES), "fp32", "fp16 becomes bf16", derived=True),
    "train.lr": Mapped("optimizer.lr", number, 1e-6, "prodigy: at least 0.1, else 1", derived=True),
    "train.optimizer": Mapped("optimizer.name", text, "adamw", "adam8, adamw8: the 8-bit optimizers", derived=True),
    "train.optimizer_params": Mapped(
        "optimizer.params, optimizer.weight_decay", section, {}, "with the optimizer's own defaults", derived=True
    ),
    "train.lr_scheduler": Mapped("schedule.name", text, "constant", "linear falls here", derived=True),
    "train.lr_scheduler_params": Mapped("schedule.params, schedule.warmup_steps", section, {}, derived=True),
    "train.ema_config.use_ema": Mapped("ema.decay, sample.weights", flag, False, derived=True),
    "train.ema_config.ema_decay": Mapped("ema.decay", number, 0.999, derived=True),
    "train.ema_config.use_feedback": Refused("feeds the average back, which is not possible here"),
    "train.ema_config.param_multiplier": Refused("grows the weights, which is not possible here", neutral=(1,)),
    "train.start_step": Refused("a run begins at its first step", "leave it out; train continues by itself"),
    "train.train_unet": Refused("nothing would be trained", "set it to true", (True,)),
    "train.train_text_encoder": WithoutEffect("finds no module of the text encoder"),
    **rows("train", WithoutEffect("only lr is used"), "unet_lr text_encoder_lr refiner_lr embedding_lr adapter_lr"),
    "train.gradient_checkpointing": HandledHere(PLANNER, (True,)),
    "train.attention_backend": HandledHere(PLANNER, ("native",)),
    **rows("train", HandledHere(PLANNER), "sdp xformers single_item_batching"),
    "train.cache_text_embeddings": Mapped(
        "data[].dropout_keeps_trigger",
        flag,
        False,
        "always cached; there it changes dropped captions",
        derived=True,
    ),
    "train.unload_text_encoder": Mapped("cache.folder", flag, False, "with cache_text_embeddings only", derived=True),
    "train.merge_network_on_save": Refused("a LoRA is written as a LoRA"),
    "train.merge_network_on_save_strength": WithoutEffect("is used with merge_network_on_save only", (1,)),
    "train.do_paramiter_swapping": Refused("trains a part of the weights at a time, which is not possible here"),
    "train.paramiter_swapping_factor": WithoutEffect("is used with do_paramiter_swapping only", (0.1,)),
    # Noise levels
    "train.noise_scheduler": Mapped(
        "timesteps.type", text, "ddpm", "must be flowmatch; left out, it is taken for that", derived=True
    ),
    "train.timestep_type": Mapped("timesteps.type", text, "sigmoid", derived=True),
    "train.content_or_style": Mapped(
        "timesteps.bias",
        one_of({"balanced": "balanced", "content": "high_noise", "style": "low_noise"}),
        "balanced",
        "content: high_noise, style: low_noise",
    ),
    "train.content_or_style_reg": WithoutEffect("content_or_style is read in its place", ("balanced",)),
    "train.min_denoising_steps": Mapped("timesteps.max", whole, 0, "from thousandths to sigma", derived=True),
    "train.max_denoising_steps": Mapped("timesteps.min", whole, 999, "from thousandths to sigma", derived=True),
    "train.num_train_timesteps": Refused("is not possible here", neutral=(1000,)),
    "train.next_sample_timesteps": WithoutEffect("is for timestep_type: next_sample", (8,)),
    "train.linear_timesteps": Mapped("timesteps.weight", flag, False, "linear, with the weight bell", derived=True),
    "train.linear_timesteps2": Refused("weighs noise levels by half a bell", "use linear_timesteps or weighted"),
    # Noise and loss
    "train.noise_offset": Mapped("timesteps.offset_noise", number, 0.0),
    **rows("train", _NOISE, "random_noise_multiplier random_noise_shift dynamic_noise_offset"),
    **rows("train", _NOISE, "do_signal_correction_noise do_batch_noise_correction force_consistent_noise"),
    **rows("train", _NOISE, "blended_blur_noise"),
    **rows("train", _SCALE, "noise_multiplier target_noise_multiplier img_multiplier latent_multiplier"),
    **rows("train", _SCALE, "noisy_latent_multiplier pred_scaler"),
    "train.adaptive_scaling_factor": Refused("scales what the model sees, which is not possible here"),
    "train.optimal_noise_pairing_samples": Refused("chooses the noise, which is not possible here", neutral=(1,)),
    "train.signal_correction_noise_scale": WithoutEffect("is used with do_signal_correction_noise only", (1,)),
    "train.batch_noise_correction_scale": WithoutEffect("is used with do_batch_noise_correction only", (0.1,)),
    "train.signal_amplification_strength": WithoutEffect("is used with do_signal_amplification only", (0.5,)),
    "train.loss_type": Mapped("loss.type, loss.delta", loss_type, "mse", "wavelet is mse there", derived=True),
    "train.loss_target": Refused("only noise is possible here", "set loss_target: noise", ("noise",)),
    **rows("train", _LOSS, "do_signal_amplification match_noise_norm correct_pred_norm t0_loss_target do_fft_loss"),
    **rows("train", _LOSS, "target_norm_std max_loss do_prior_divergence do_blank_stabilization do_cfg do_random_cfg"),
    **rows("train", _LOSS, "latent_feature_extractor_path diffusion_feature_extractor_path"),
    "train.t0_velocity_equiv_weight": WithoutEffect("is used with t0_loss_target only"),
    "train.do_fft_velocity_equiv_weight": WithoutEffect("is used with do_fft_loss only"),
    "train.correct_pred_norm_multiplier": WithoutEffect("is used with correct_pred_norm only", (1,)),
    "train.target_norm_std_value": WithoutEffect("is used with target_norm_std only", (1,)),
    "train.max_loss_debug": WithoutEffect("is used with max_loss only"),
    **rows("train", WithoutEffect("is used with do_cfg only", (*OFF, 1)), "cfg_scale max_cfg_scale cfg_rescale"),
    **rows("train", WithoutEffect("is used with do_cfg only", (*OFF, 1)), "negative_prompt max_negative_prompts"),
    **rows("train", WithoutEffect("is used with an extractor only", (1,)), "latent_feature_loss_weight"),
    **rows("train", WithoutEffect("is used with an extractor only", (1,)), "diffusion_feature_extractor_weight"),
    **rows("train", _SNR, "min_snr_gamma snr_gamma learnable_snr_gos"),
    "train.standardize_latents": Refused("stops AI Toolkit too: it knows latents of 4 channels only"),
    "train.standardize_images": Refused("changes images, which is not possible here"),
    # Guidance and preservation
    "train.do_differential_guidance": Mapped(
        "guidance.differential", flag, False, "without effect there unless do_guidance_loss is on", derived=True
    ),
    "train.differential_guidance_scale": Mapped("guidance.differential", number, 3.0, derived=True),
    "train.do_guidance_loss": Mapped("guidance.contrastive", flag, False, derived=True),
    "train.guidance_loss_target": Mapped("guidance.contrastive", anything, 3.0, "one number", derived=True),
    "train.do_guidance_loss_cfg_zero": Mapped("guidance.cfg_zero", flag, False, derived=True),
    "train.guidance_loss_schedule": Mapped(
        "guidance.contrastive_schedule", guidance_schedule, "constant", derived=True
    ),
    "train.unconditional_prompt": Refused("guidance goes away from the empty prompt"),
    "train.diff_output_preservation": Mapped("preserve.kind", flag, False, "trigger", derived=True),
    "train.diff_output_preservation_multiplier": Mapped("preserve.weight", number, 1.0, derived=True),
    "train.diff_output_preservation_class": Mapped("preserve.class_word", text, "", derived=True),
    "train.blank_prompt_preservation": Mapped("preserve.kind", flag, False, "blank", derived=True),
    "train.blank_prompt_preservation_multiplier": Mapped("preserve.weight", number, 1.0, derived=True),
    "train.inverted_mask_prior": Mapped("data[].mask_prior", flag, False, derived=True),
    "train.inverted_mask_prior_multiplier": Mapped("data[].mask_prior", number, 0.5, derived=True),
    "train.reg_weight": Mapped("data[].weight", number, 1.0, "for regularization images", derived=True),
    # Text
    "train.prompt_saturation_chance": Refused("changes captions, which is not possible here"),
    "train.short_and_long_captions": Refused("reads two captions an image, which is not possible here"),
    # Previews and validation
    "train.skip_first_sample": Mapped("sample.first", flag, False, derived=True),
    "train.force_first_sample": HandledHere("previews before step 1 are drawn once, not at each start"),
    "train.disable_sampling": Mapped("sample.every", flag, False, derived=True),
    "train.validation_config.validation_items": Refused(
        "validation images are a folder here", "put them with their captions in a folder, and set validation.folder"
    ),
    "train.validation_config.resolution": WithoutEffect("is used with validation_items only", (512,)),
    "train.validation_config.validate_every_n_steps": WithoutEffect("is used with validation_items only", (10,)),
    "train.validation_config.validation_sigmas": WithoutEffect("is used with validation_items only"),
    # What Z-Image does not use
    **rows("train", _OTHER_MODELS, "prompt_dropout_prob weight_jitter bypass_guidance_embedding train_turbo"),
    **rows("train", _OTHER_MODELS, "show_turbo_outputs free_u short_and_long_captions_encoder_split"),
    **rows("train", _OTHER_MODELS, "adapter_assist_name_or_path match_adapter_assist match_adapter_chance"),
    "train.adapter_assist_type": WithoutEffect("is for other models", ("t2i",)),
    "train.train_refiner": WithoutEffect("is for other models", (True,)),
    **rows("train", WithoutEffect("is for other models", (1,)), "switch_boundary_every audio_loss_multiplier"),
}

MODEL: dict[str, Row] = {
    "model.name_or_path": Mapped("model.variant, model.path", text, remark="the variant follows", derived=True),
    "model.extras_name_or_path": Mapped("model.extras", text, derived=True),
    "model.arch": Mapped("model.variant", text, remark="its tag counts where the path says nothing", derived=True),
    "model.assistant_lora_path": Mapped("model.adapter", text, remark="left out: none", derived=True),
    "model.quantize": Mapped("model.quantize", flag, False, "true: auto", derived=True),
    "model.qtype": Mapped("model.quantize", text, "qfloat8", "the planner chooses", derived=True),
    "model.accuracy_recovery_adapter": Refused("is not possible here"),
    **rows("model", HandledHere(PLANNER), "quantize_te low_vram layer_offloading auto_memory compile block_compile"),
    **rows("model", HandledHere(PLANNER), "compile_fullgraph cache_size_limit"),
    **rows("model", HandledHere(PLANNER, ("default",)), "compile_mode"),
    **rows("model", HandledHere(PLANNER, (True,)), "compile_dynamic"),
    **rows("model", HandledHere(PLANNER, ("qfloat8",)), "qtype_te"),
    **rows(
        "model",
        HandledHere(PLANNER, (1,)),
        "layer_offloading_transformer_percent layer_offloading_text_encoder_percent",
    ),
    **rows(
        "model", HandledHere("text encoder and VAE have their own precision"), "vae_dtype te_dtype vae_device te_device"
    ),
    "model.latent_space_version": HandledHere(CACHES),
    **rows("model", Refused("is for flux only, there too"), "attn_masking split_model_over_gpus"),
    "model.inference_lora_path": Refused("stops AI Toolkit too"),
    **rows("model", WithoutEffect("is for models trained in full"), "ignore_if_contains only_if_contains"),
    "model.dtype": WithoutEffect("train.dtype counts", ()),
    **rows("model", _OTHER_MODELS, "vae_path te_name_or_path lora_path unet_path model_kwargs model_paths"),
    **rows("model", _OTHER_MODELS, "quantize_kwargs refiner_name_or_path refiner_start_at unconditional_lora_path"),
    **rows("model", _OTHER_MODELS, "use_text_encoder_1 use_text_encoder_2 text_encoder_bits unet_sample_size"),
    **rows("model", _OTHER_MODELS, "split_model_other_module_param_count_scale in_context experimental_xl"),
    **rows(
        "model",
        Refused("names another family of models", "give a job for Z-Image"),
        "is_flux is_xl is_v2 is_v3 is_pixart is_pixart_sigma is_auraflow is_lumina2 is_ssd is_vega is_v_pred "
        "use_flux_cfg",
    ),
}

_VIDEO = WithoutEffect(STILL)
_CONTROL = WithoutEffect(CONTROL)
_IMAGE = Refused("changes images, which is not possible here")

DATASETS: dict[str, Row] = {
    "datasets[].folder_path": Mapped("data[].folder", text, derived=True),
    "datasets[].dataset_path": Mapped("data[].folder", text, remark="a folder; wins over folder_path", derived=True),
    "datasets[].type": Refused("only images are trained", "set type: image", ("image",)),
    "datasets[].resolution": Mapped("data[].resolution", anything, 512),
    "datasets[].num_repeats": Mapped("data[].repeats", whole, 1),
    "datasets[].batch_size": Mapped("data[].batch_size", whole),
    "datasets[].trigger_word": Mapped("data[].trigger", text, derived=True),
    "datasets[].default_caption": Mapped("data[].default_caption", text, ""),
    "datasets[].caption_ext": Mapped("data[].caption_ext", text, ".txt", "with or without its dot", derived=True),
    "datasets[].caption_type": Mapped("data[].caption_ext", text, remark="wins over caption_ext", derived=True),
    "datasets[].caption_dropout_rate": Mapped("data[].caption_dropout", number, 0.0),
    "datasets[].cache_text_embeddings": Mapped(
        "data[].dropout_keeps_trigger", flag, False, "as train.cache_text_embeddings", derived=True
    ),
    "datasets[].shuffle_tokens": Mapped("data[].shuffle_tags", flag, False),
    "datasets[].keep_tokens": Mapped("data[].keep_tags", whole, 0, "counts for shuffling too", derived=True),
    "datasets[].token_dropout_rate": Mapped("data[].tag_dropout", number, 0.0),
    "datasets[].flip_x": Mapped("data[].flip", flag, False),
    "datasets[].flip_y": Refused("images are not turned upside down"),
    "datasets[].is_reg": Mapped("data[].regularization", flag, False, "half of the passes", derived=True),
    "datasets[].prior_reg": Mapped("data[].regularization", flag, False, "prior; only with is_reg", derived=True),
    "datasets[].loss_multiplier": Mapped("data[].weight", number, 1.0, derived=True),
    "datasets[].mask_path": Mapped("data[].mask", text, derived=True),
    "datasets[].alpha_mask": Mapped("data[].mask", flag, False, "alpha; wins over mask_path", derived=True),
    "datasets[].mask_min_value": Mapped("data[].mask_floor", number, 0.0, derived=True),
    "datasets[].invert_mask": Refused("masks are not inverted", "invert the mask files: white is trained"),
    "datasets[].network_weight": Refused("a LoRA is trained at full strength", neutral=(1,)),
    "datasets[].random_triggers": Refused("changes captions, which is not possible here"),
    "datasets[].random_triggers_max": WithoutEffect("is used with random_triggers only", (1,)),
    "datasets[].use_short_captions": Refused("reads two captions an image, which is not possible here"),
    **rows("datasets[]", _IMAGE, "random_scale random_crop square_crop standardize_images augments augmentations"),
    "datasets[].scale": Refused("changes images, which is not possible here", neutral=(1,)),
    "datasets[].shuffle_augmentations": WithoutEffect("is used with augmentations only"),
    "datasets[].replay_transforms": WithoutEffect("is used with augmentations only", (True,)),
    "datasets[].buckets": Refused("images keep their shape, in buckets", "set it to true", (True,)),
    "datasets[].bucket_tolerance": WithoutEffect("the model sets it to 16", (16, 64)),
    "datasets[].unconditional_path": Refused("trains against other images, which is not possible here"),
    "datasets[].poi": Refused("stops AI Toolkit too"),
    **rows("datasets[]", HandledHere(CACHES), "cache_latents cache_latents_to_disk cache_tensors_to_disk"),
    **rows("datasets[]", HandledHere(CACHES), "load_image_when_caching_latents cache_clip_vision_to_disk"),
    "datasets[].num_workers": HandledHere(PLANNER, (2,)),
    "datasets[].prefetch_factor": HandledHere(PLANNER, (2,)),
    **rows("datasets[]", HandledHere(PLANNER), "cache_latents_num_workers fast_image_size"),
    "datasets[].guidance_type": WithoutEffect("is used with unconditional_path only", ("targeted",)),
    "datasets[].replacements": WithoutEffect("is for its older datasets"),
    "datasets[].extra_values": _OTHER_MODELS,
    **rows("datasets[]", _CONTROL, "control_path control_path_1 control_path_2 control_path_3 inpaint_path controls"),
    **rows("datasets[]", _CONTROL, "control_from_same_folder clip_image_path clip_image_from_same_folder"),
    **rows("datasets[]", _CONTROL, "clip_image_augmentations clip_image_shuffle_augmentations"),
    "datasets[].num_controls_from_same_folder": WithoutEffect(CONTROL, (1,)),
    "datasets[].control_transparent_color": WithoutEffect(CONTROL, ([0, 0, 0],)),
    "datasets[].full_size_control_images": WithoutEffect(CONTROL, (True,)),
    "datasets[].num_frames": Refused("videos are not trained", "set num_frames: 1", (0, 1)),
    "datasets[].shrink_video_to_frames": WithoutEffect(STILL, (True,)),
    "datasets[].trim_auto_frame_count_tail": WithoutEffect(STILL, (True,)),
    "datasets[].fps": WithoutEffect(STILL, (24,)),
    **rows("datasets[]", _VIDEO, "auto_frame_count do_i2v do_audio audio_preserve_pitch audio_normalize debug"),
    **rows("datasets[]", WithoutEffect("train.diff_output_preservation counts"), "diff_output_preservation"),
    **rows("datasets[]", WithoutEffect("train.diff_output_preservation counts"), "diff_output_preservation_class"),
}

PREVIEW_STRENGTH = "previews are drawn with the LoRA at strength 1"

SAMPLE: dict[str, Row] = {
    "sample.sample_every": Mapped("sample.every", whole, 100, derived=True),
    "sample.prompts": Mapped("sample.prompts", texts, (), "an older form of samples", derived=True),
    "sample.width": Mapped("sample.width", whole, 512, "rounded down to a multiple of 16", derived=True),
    "sample.height": Mapped("sample.height", whole, 512, "rounded down to a multiple of 16", derived=True),
    "sample.neg": Mapped("sample.negative", anything, "", derived=True),
    "sample.seed": Mapped("sample.seed", whole, 0, derived=True),
    "sample.walk_seed": Mapped("sample.prompts[].seed", flag, False, "false: all have one seed", derived=True),
    "sample.guidance_scale": Mapped("sample.guidance", number, 7.0, "less 1, at least 0", derived=True),
    "sample.sample_steps": Mapped("sample.steps", whole, 20, "9 on Turbo becomes 8", derived=True),
    "sample.network_multiplier": HandledHere(PREVIEW_STRENGTH, (1,)),
    "sample.sampler": WithoutEffect("always Euler, as in the pipeline", ("flowmatch",)),
    "sample.sample_start_step": HandledHere("previews begin with the run"),
    "sample.format": HandledHere("previews are PNG files"),
    **rows("sample", WithoutEffect(STILL, (0, 1)), "num_frames fps"),
    **rows("sample", _OTHER_MODELS, "guidance_rescale extra_values do_cfg_norm refiner_start_at"),
    "sample.adapter_conditioning_scale": WithoutEffect("is for other models", (1,)),
    "sample.samples[].prompt": Mapped("sample.prompts[].prompt", text, remark="and its flags, below", derived=True),
    "sample.samples[].width": Mapped("sample.prompts[].width", whole, remark="`--w`", derived=True),
    "sample.samples[].height": Mapped("sample.prompts[].height", whole, remark="`--h`", derived=True),
    "sample.samples[].neg": Mapped("sample.prompts[].negative", anything, remark="`--n`", derived=True),
    "sample.samples[].seed": Mapped("sample.prompts[].seed", whole, remark="`--d`, `--seed`", derived=True),
    "sample.samples[].guidance_scale": Mapped(
        "sample.guidance", number, remark="`--l`, `--cfg`; where all prompts agree", derived=True
    ),
    "sample.samples[].sample_steps": Mapped(
        "sample.steps", whole, remark="`--s`, `--steps`; where all prompts agree", derived=True
    ),
    "sample.samples[].network_multiplier": HandledHere(PREVIEW_STRENGTH, (1, "1", "1.0")),
    **rows("sample.samples[]", _VIDEO, "num_frames fps"),
    **rows("sample.samples[]", _CONTROL, "ctrl_img ctrl_idx ctrl_img_1 ctrl_img_2 ctrl_img_3"),
    "sample.samples[].do_cfg_norm": _OTHER_MODELS,
}

KEYS = FILE | PROCESS | NETWORK | SAVE | TRAIN | MODEL | DATASETS | SAMPLE | LOGGING
"""All keys by their path below the process; `[]` stands for each entry of a list."""

FLAGS = {
    "w": "width", "h": "height", "d": "seed", "seed": "seed", "n": "neg", "l": "guidance_scale",
    "cfg": "guidance_scale", "s": "sample_steps", "steps": "sample_steps",
}  # fmt: skip
"""Flag of a prompt, such as `--w 768` -> the key of the prompt that it sets."""
FLAGS_LEFT_OUT = {
    **dict.fromkeys(("m", "network_multiplier"), PREVIEW_STRENGTH),
    **dict.fromkeys(("frames", "num_frames", "fps"), STILL),
    **dict.fromkeys(("ctrl_img", "ctrl_idx"), CONTROL),
    **dict.fromkeys(("p2", "n2"), "Z-Image has one text encoder"),
    **dict.fromkeys(("gr", "a", "ref", "ev", "extra_values"), "is for other models"),
}
"""Flag that is left out -> the reason."""

TYPOS = {
    "learning_rate": "lr", "max_train_steps": "steps", "num_train_steps": "steps", "network_dim": "linear",
    "network_alpha": "linear_alpha", "repeats": "num_repeats", "folder": "folder_path", "caption_dropout":
    "caption_dropout_rate", "trigger": "trigger_word", "shuffle_caption": "shuffle_tokens", "gradient_accumulate":
    "gradient_accumulation", "scheduler": "lr_scheduler", "negative": "neg", "save_dtype": "dtype",
}  # fmt: skip
"""Name of a key in other trainers -> AI Toolkit's name, for the hints of unknown keys."""
