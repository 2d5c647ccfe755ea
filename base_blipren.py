"""Base class of the models: freezing, full and bridge checkpoints."""

import contextlib
import copy
import os
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel

from .base_models_blipren import hash_weights, optional_file, weight_files
from .configuration_blipren import AUTO_MAP, CUSTOM_PIPELINES, BliprenConfig, copy_code_files
from .memory_blipren import find_memory
from .patch_features_blipren import BliprenPatchFeaturesMixin
from .reranker_blipren import find_reranker

_HUB_KEYWORDS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


def _exclude_connector(quantization_config):
    """Return a copy of a quantisation config that leaves connector and head unquantised.

    The connector is small and trained; the head may share its weight with the embeddings.
    """
    config = copy.deepcopy(quantization_config)
    for name in ("llm_int8_skip_modules", "modules_to_not_convert"):  # bitsandbytes; torchao and others
        if hasattr(config, name):
            excluded = list(getattr(config, name) or [])
            setattr(config, name, excluded + ["model.qformer", "model.projector", "lm_head"])
    return config


class BliprenPreTrainedModel(BliprenPatchFeaturesMixin, PreTrainedModel):
    """Base class of `BliprenModel`, `BliprenForConditionalGeneration` and `BliprenForImageTextRetrieval`."""

    config_class = BliprenConfig
    config: BliprenConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("image", "video", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["BliprenQFormerLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    # the connector is small and trained: it stays in float32 whatever dtype the frozen parts have
    _keep_in_fp32_modules_strict = ["qformer", "projector"]
    # names in config.base_models of the frozen parts that this class has
    _base_parts = ("vision", "second_vision", "llm")

    def __init__(self, config: BliprenConfig, *inputs, **kwargs):
        super().__init__(config, *inputs, **kwargs)
        if config.connector == "patches":
            self._keep_in_fp32_modules_strict = set(self._keep_in_fp32_modules_strict or ()) - {"qformer"}

    # ---- freezing -------------------------------------------------------------------------------------------------

    def parts(self) -> dict[str, nn.Module]:
        """Return the modules by part name: `vision`, `qformer`, `projector`, `llm`, `head`, and those of a subclass."""
        inner = self.base_model
        names = {
            "vision": "vision_tower",
            "second_vision": "second_vision_tower",
            "qformer": "qformer",
            "projector": "projector",
            "llm": "language_model",
        }
        parts = {part: getattr(inner, name) for part, name in names.items() if getattr(inner, name, None) is not None}
        if getattr(self, "lm_head", None) is not None:
            parts["head"] = self.lm_head
        return parts

    def freeze(self, train: tuple[str, ...] | list[str] = ("connector",)) -> None:
        """Freeze every part that is not named: no gradient, eval mode.

        Args:
            train: names of the parts to train: those of [`parts`], `connector` (Q-Former and projector), `lora`
                (adapters in the language model). `llm` includes its head.

        Raises:
            ValueError: for a part that the model does not have.
        """
        parts = self.parts()
        trained = set()
        for name in train:
            trained |= {"connector": {"qformer", "projector"}, "llm": {"llm", "head"}}.get(name, {name}) - (
                {"qformer", "projector", "head"} - set(parts)
            )
        if unknown := trained - set(parts) - {"lora"}:
            raise ValueError(
                f"no part {sorted(unknown)[0]!r} to train; parts are {', '.join([*parts, 'connector', 'lora'])}"
            )
        for part, module in parts.items():
            for parameter in module.parameters():
                # integer weights of a quantised model cannot have a gradient
                parameter.requires_grad_(part in trained and parameter.is_floating_point())
        if "head" in parts and "llm" not in trained and "llm" in parts:
            # a tied head is the embedding of the language model, which stays frozen
            parts["head"].requires_grad_(False)
        if "qformer" in parts and "llm" in self._base_parts:
            for parameter in parts["qformer"].text_parameters():
                parameter.requires_grad_(False)  # only stage 1 uses and trains the text side
        if "lora" in trained:
            for name, parameter in parts["llm"].named_parameters():
                if "lora_" in name:  # the prefix that PEFT uses
                    parameter.requires_grad_(True)
        self.train(self.training)

    def describe_trainable(self) -> str:
        """Return one line a part: name, class, number of parameters, number of trained parameters."""
        lines, seen = [], set()
        for part, module in self.parts().items():
            parameters = [p for p in module.parameters() if id(p) not in seen]
            seen |= {id(p) for p in parameters}
            total = sum(p.numel() for p in parameters)
            trained = sum(p.numel() for p in parameters if p.requires_grad)
            lines.append(f"{part:>12} {type(module).__name__:<28} {total:>14,} parameters, {trained:>13,} trained")
        return "\n".join(lines)

    def train(self, mode: bool = True):
        super().train(mode)
        self._keep_frozen_in_eval()
        return self

    def _keep_frozen_in_eval(self) -> None:
        # train() may have been called on any module: a frozen one must have no dropout and no running statistics
        for module in self.modules():
            if (
                module is not self
                and isinstance(module, PreTrainedModel)
                and not isinstance(module, BliprenPreTrainedModel)
                and not any(p.requires_grad for p in module.parameters())
                and any(m.training for m in module.modules())
            ):
                module.eval()

    # ---- saving ---------------------------------------------------------------------------------------------------

    def _write_code_and_maps(self, save_directory: str | os.PathLike) -> None:
        self.config.auto_map = dict(AUTO_MAP)
        self.config.custom_pipelines = {task: dict(value) for task, value in CUSTOM_PIPELINES.items()}
        copy_code_files(save_directory)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> None:
        """Write a full checkpoint, with the code that loads it. LoRA adapters go to `adapter/`."""
        self._save(save_directory, "full", kwargs.pop("state_dict", None), **kwargs)

    def save_bridge(self, save_directory: str | os.PathLike, state_dict: dict | None = None, **kwargs) -> None:
        """Write a bridge checkpoint: what was trained, and ids, revisions and hashes of the frozen parts.

        It also holds a part that an earlier run trained, whose weights are no longer those of its base model.

        Raises:
            ValueError: when `config.base_models` is empty, or a frozen part was trained.
        """
        if not self.config.base_models:
            raise ValueError(
                "a bridge checkpoint needs config.base_models (ids and revisions of the frozen parts), which "
                "from_vision_text_pretrained sets; save this model with save_pretrained"
            )
        if trained := self._trained_base_parts():
            raise ValueError(
                f"the {trained[0]} model was trained, and a bridge checkpoint does not hold it; use save_pretrained"
            )
        state_dict = state_dict if state_dict is not None else self.state_dict()
        frozen = self._frozen_prefixes()
        kept = {k: v for k, v in state_dict.items() if not k.startswith(frozen) and "lora_" not in k}
        self._save(save_directory, "bridge", kept, **kwargs)

    def _trained_base_parts(self) -> list[str]:
        """Return the base models, of `vision`, `second_vision` and `llm`, that have trainable weights besides LoRA's."""
        modules = {part: self.parts().get(part) for part in ("vision", "second_vision", "llm")}
        return [
            part
            for part, module in modules.items()
            if module is not None and any(p.requires_grad and "lora_" not in n for n, p in module.named_parameters())
        ]

    def _frozen_prefixes(self) -> tuple[str, ...]:
        """Return the prefixes of the weights that a bridge checkpoint leaves out: those of its base models."""
        prefixes = {
            "vision": ("model.vision_tower.",),
            "second_vision": ("model.second_vision_tower.",),
            "llm": ("model.language_model.", "lm_head."),
        }
        bases = self.config.base_models.items()
        return tuple(prefix for part, base in bases if not base.get("trained") for prefix in prefixes[part])

    def _save(self, save_directory, checkpoint_type: str, state_dict: dict | None, **kwargs) -> None:
        with_adapter = getattr(self, "_hf_peft_config_loaded", False)
        if with_adapter and checkpoint_type == "full" and getattr(self, "hf_quantizer", None) is not None:
            raise ValueError(
                "a quantised model with an adapter cannot be saved as a full checkpoint: use save_bridge, which loads "
                "with and without quantisation, then `blipren convert` for a full checkpoint"
            )
        self._write_code_and_maps(save_directory)
        if with_adapter:
            # transformers' save_pretrained would write the adapter only
            super().save_pretrained(Path(save_directory) / "adapter")
            state_dict = state_dict if state_dict is not None else self.state_dict()
            state_dict = {k.replace(".base_layer.", "."): v for k, v in state_dict.items() if "lora_" not in k}
            self._hf_peft_config_loaded = False
            try:
                self._save(save_directory, checkpoint_type, state_dict, **kwargs)
            finally:
                self._hf_peft_config_loaded = True
            return
        if checkpoint_type == "bridge" and getattr(self, "hf_quantizer", None) is not None:
            # no weight of a bridge is quantised; with a quantizer transformers would write the quantised weights
            quantizer, self.hf_quantizer = self.hf_quantizer, None
            quantization_config = self.config.__dict__.pop("quantization_config")
            try:
                self._save(save_directory, checkpoint_type, state_dict, **kwargs)
            finally:
                self.hf_quantizer, self.config.quantization_config = quantizer, quantization_config
            return
        for name in self.config.sub_configs:  # loading sets a dtype in every sub-config: saving writes the same
            sub_config = getattr(self.config, name)
            if sub_config is not None and sub_config.dtype is None:
                sub_config.dtype = self.dtype
        for name in ("memory", "reranker"):
            if kwargs.get("is_main_process", True) and getattr(self, name, None) is not None:
                getattr(self, f"save_{name}")(save_directory)
        for part in self._trained_base_parts():
            if self.config.base_models:
                self.config.base_models[part]["trained"] = True
        previous, self.config.checkpoint_type = self.config.checkpoint_type, checkpoint_type
        try:
            super().save_pretrained(save_directory, state_dict=state_dict, **kwargs)
        finally:
            self.config.checkpoint_type = previous

    def load_adapter(self, *args, **kwargs):
        """Load an adapter as transformers does, with two of its faults corrected.

        It leaves the adapter's renaming of weights on the model, which the next save would apply to all weights. It puts
        the adapters of offloaded layers on a device from which nothing fetches them; here they stay in memory.
        """
        conversions = getattr(self, "_weight_conversions", None)
        placed = getattr(self, "hf_device_map", None)
        if placed is not None:
            # accelerate computes offloaded layers on the first device that is neither CPU nor disk
            computing = next((where for where in placed.values() if where not in ("cpu", "disk")), "cpu")
            self.hf_device_map = {n: computing if where in ("cpu", "disk") else where for n, where in placed.items()}
        try:
            return super().load_adapter(*args, **kwargs)
        finally:
            self._weight_conversions = conversions
            if placed is not None:
                self.hf_device_map = placed

    # ---- loading --------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *model_args,
        config: PreTrainedConfig | None = None,
        verify_base_weights: bool = False,
        **kwargs,
    ):
        r"""Load a full or a bridge checkpoint.

        Args:
            pretrained_model_name_or_path: folder or Hub id.
            config: config to use instead of the checkpoint's.
            verify_base_weights: for a bridge: hash the frozen parts' weights completely, instead of samples of them.
            kwargs: as in [`~PreTrainedModel.from_pretrained`].

        Raises:
            ValueError: when weights are missing or unexpected or have another shape, or when a frozen part differs from
                the one that the bridge was trained with.
        """
        output_loading_info = kwargs.pop("output_loading_info", False)
        if pretrained_model_name_or_path is None:  # transformers loads a given state dict so
            return super().from_pretrained(
                None, *model_args, config=config, output_loading_info=output_loading_info, **kwargs
            )
        if kwargs.get("quantization_config") is not None:
            kwargs["quantization_config"] = _exclude_connector(kwargs["quantization_config"])
        # transformers' error names no weight; the checks below do
        kwargs.setdefault("ignore_mismatched_sizes", True)
        hub_kwargs = {key: kwargs[key] for key in _HUB_KEYWORDS if key in kwargs}
        raw, _ = cls.config_class.get_config_dict(pretrained_model_name_or_path, **hub_kwargs)
        if raw.get("model_type") != cls.config_class.model_type:
            raise ValueError(
                f"{pretrained_model_name_or_path} is not a BLIPren checkpoint: its config.json has model_type "
                f"{raw.get('model_type')!r}; make one with `blipren new`"
            )
        stage_1 = "BliprenForImageTextRetrieval" in (raw.get("architectures") or []) and "llm" in cls._base_parts
        if raw.get("checkpoint_type") == "bridge" or (stage_1 and raw.get("base_models")):
            # a full checkpoint of stage 1 has no language model: that part comes from its base model
            config = config if config is not None else cls.config_class.from_dict(raw)
            state_dict = cls._merge_bridge(pretrained_model_name_or_path, config, verify_base_weights, hub_kwargs)
            own_kwargs = {key: value for key, value in kwargs.items() if key not in _HUB_KEYWORDS}
            model, info = super().from_pretrained(
                None, *model_args, config=config, state_dict=state_dict, output_loading_info=True, **own_kwargs
            )
            model.config.name_or_path = str(pretrained_model_name_or_path)
            if cls.can_generate():
                with contextlib.suppress(OSError):  # without such a file the defaults stay
                    model.generation_config = GenerationConfig.from_pretrained(
                        pretrained_model_name_or_path, **hub_kwargs
                    )
        else:
            if config is not None:
                kwargs["config"] = config
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
            )
        for kind in ("missing", "unexpected", "mismatched"):
            if keys := sorted(map(str, info[f"{kind}_keys"])):
                raise ValueError(
                    f"{pretrained_model_name_or_path} is not a complete {cls.__name__}: {len(keys)} {kind} weights, such "
                    f"as {keys[0]!r}"
                )
        hub_kwargs.pop("subfolder", None)
        adapter = optional_file(pretrained_model_name_or_path, "adapter/adapter_config.json", hub_kwargs)
        if adapter is not None:
            model.load_adapter(str(adapter.parent))
        if cls.can_generate():
            if (memory := find_memory(pretrained_model_name_or_path, hub_kwargs)) is not None:
                model.load_memory(memory)
            if (reranker := find_reranker(pretrained_model_name_or_path, hub_kwargs)) is not None:
                model.load_reranker(reranker)
        model.freeze()
        return (model, info) if output_loading_info else model

    @classmethod
    def _merge_bridge(cls, path, config: BliprenConfig, verify_whole: bool, hub_kwargs: dict) -> dict:
        """Return the weights of a bridge and of its frozen parts, under the names of the whole model."""
        base_hub_kwargs = {k: v for k, v in hub_kwargs.items() if k in ("cache_dir", "local_files_only", "token")}
        merged = {}
        for file in weight_files(str(path), **hub_kwargs):
            merged.update(load_file(file))
        for part, auto_class, sub_config in (
            ("vision", AutoModel, config.vision_config),
            ("second_vision", AutoModel, config.second_vision_config),
            ("llm", AutoModelForCausalLM, config.text_config),
        ):
            prefix = "model.language_model." if part == "llm" else f"model.{part}_tower."
            if sub_config is None or part not in cls._base_parts or any(name.startswith(prefix) for name in merged):
                continue
            reference = config.base_models[part]
            where = f"{reference['id']}" + (f" at revision {reference['revision']}" if reference["revision"] else "")
            try:
                files = weight_files(reference["id"], reference["revision"], **base_hub_kwargs)
            except OSError as error:
                raise ValueError(
                    f"{path} is a bridge checkpoint for the {part} model {where}, which cannot be found: {error}"
                ) from error
            kind = "sha256" if verify_whole else "sampled_sha256"
            if (found := hash_weights(files, sampled=not verify_whole)) != reference[kind]:
                raise ValueError(
                    f"{path} is a bridge checkpoint for the {part} model {where}, whose weights differ from those it was "
                    f"trained with ({kind} {found[:12]}, trained with {reference[kind][:12]}); restore them, or load a "
                    "full checkpoint"
                )
            base = auto_class.from_pretrained(
                reference["id"],
                revision=reference["revision"],
                config=sub_config,
                dtype=config.dtype or "auto",
                **base_hub_kwargs,
            )
            merged.update(cls._base_state_dict(part, base))
        return merged

    @staticmethod
    def _base_state_dict(part: str, base: nn.Module) -> dict[str, torch.Tensor]:
        if part != "llm":
            return {f"model.{part}_tower.{key}": value for key, value in base.state_dict().items()}
        state = {f"model.language_model.{key}": value for key, value in base.base_model.state_dict().items()}
        head = base.get_output_embeddings().state_dict()
        return {**state, **{f"lm_head.{key}": value for key, value in head.items()}}


__all__ = ["BliprenPreTrainedModel"]
