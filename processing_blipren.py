"""Processor: the same image processing, prompts and tokens in training, inference and serving."""

import os
from pathlib import Path

from transformers import AutoTokenizer, GenerationConfig
from transformers.image_utils import ImageInput
from transformers.processing_utils import MultiModalData, ProcessingKwargs, ProcessorMixin, Unpack

from .configuration_blipren import AUTO_MAP, copy_code_files, split_revision
from .grounding_blipren import read_places, to_pixels
from .image_blipren import check_image_sources, with_fast_resize
from .pieces_blipren import with_pieces
from .prompts_blipren import (
    DEFAULT_CHAT_PROMPT,
    DEFAULT_PROMPT,
    IMAGE_TOKEN,
    build_chat_template,
    end_of_answer_id,
    pick_image_token,
    pick_video_token,
)
from .text_encoding_blipren import BliprenTextEncodingMixin
from .video_blipren import BliprenVideoProcessor, as_videos, holds_videos, read_videos
from .vision_blipren import load_vision_setup

QFORMER_TOKENIZER = "qformer_tokenizer"  # folder of a checkpoint


class BliprenProcessorKwargs(ProcessingKwargs, total=False):
    _defaults = {"text_kwargs": {"padding": True}}


class BliprenProcessor(ProcessorMixin, BliprenTextEncodingMixin):
    r"""Image processor, tokenizer, placeholder and prompts of a model.

    Args:
        image_processor: image processor of the vision encoder.
        tokenizer: tokenizer of the language model; it pads on the left.
        chat_template (`str`, *optional*): Jinja template that places images, see [`build_chat_template`].
        image_token (`str`): placeholder of an image.
        video_token (`str`, *optional*): placeholder of a video, of a model that takes videos.
        frames_per_video (`int`, *optional*): frames of a video; `None` for a model that takes none.
        num_video_tokens (`int`, *optional*): placeholders a video.
        frame_times (`bool`): return `seconds_per_frame` beside videos, for a model whose time embedding is by seconds.
        num_visual_tokens (`int`, *optional*): placeholders an image; `None` if images differ (NaFlex, tiles).
        answer_end (`str`): token that ends an answer.
        answer_start (`str`): text between prompt and answer: a space for plain prompts, nothing for chats and for the
            empty prompt `""`.
        prompts (`list[str]`): caption prompts; inference uses the first one.
        system_prompts (`list[str]`): system prompts; inference uses the first one, none if empty.
        qformer_reads_prompt (`bool`): also return the prompt in tokens of the Q-Former (InstructBLIP).

    Raises:
        ValueError: for a prompt that ends in a space.
    """

    valid_processor_kwargs = BliprenProcessorKwargs

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        chat_template=None,
        image_token: str = IMAGE_TOKEN,
        num_visual_tokens: int | None = 32,
        video_token: str | None = None,
        frames_per_video: int | None = None,
        num_video_tokens: int | None = None,
        frame_times: bool = False,
        answer_end: str | None = None,
        answer_start: str = " ",
        prompts: list[str] | None = None,
        system_prompts: list[str] | None = None,
        qformer_reads_prompt: bool = False,
        **kwargs,
    ):
        self.qformer_reads_prompt = qformer_reads_prompt
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        self.num_visual_tokens = num_visual_tokens
        self.video_token = video_token
        self.video_token_id = tokenizer.convert_tokens_to_ids(video_token) if video_token is not None else None
        self.frames_per_video = frames_per_video
        self.num_video_tokens = num_video_tokens
        self.frame_times = frame_times
        self.answer_end = answer_end if answer_end is not None else tokenizer.eos_token
        self.answer_start = answer_start
        self.prompts = prompts or [DEFAULT_PROMPT]
        self.system_prompts = system_prompts or []
        self.qformer_tokenizer = None  # set by `blipren align`; saved in a folder of its own
        for prompt in [*self.prompts, *self.system_prompts]:
            if prompt != prompt.rstrip():
                raise ValueError(
                    f"prompt {prompt!r} ends in a space, which would be another token in front of an answer; remove it"
                )
        tokenizer.padding_side = "left"  # save_pretrained of a tokenizer does not write it
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.image_processor = with_pieces(with_fast_resize(image_processor))

    # ---- construction ---------------------------------------------------------------------------------------------

    @classmethod
    def from_vision_text_pretrained(
        cls,
        vision: str | os.PathLike | list[str | os.PathLike],
        llm: str | os.PathLike,
        *,
        connector: str = "qformer",
        num_queries: int = 32,
        vision_feature_layer: int | list[int] = -1,
        vision_feature_select: str = "patches",
        scales: list[int] | None = None,
        scale_join: str = "channels",
        tiles: int | None = None,
        frames: int | None = None,
        frame_tokens: bool = False,
        time_embedding: str = "sinusoidal",
        image_processor_options: dict | None = None,
        prompts: list[str] | None = None,
        system_prompts: list[str] | None = None,
        **hub_kwargs,
    ) -> "BliprenProcessor":
        r"""Make the processor for [`BliprenForConditionalGeneration.from_vision_text_pretrained`], same arguments.

        Args:
            vision, llm: Hub ids (perhaps `id@revision`) or folders.
            connector, num_queries and the others up to time_embedding: as for the model.
            image_processor_options: settings of the image processor, such as `{"do_center_crop": False}`.
            prompts: caption prompts; by default "Short caption:", or a sentence for chat models.
            system_prompts: system prompts, for chat models.
            hub_kwargs: `cache_dir`, `token`, `local_files_only`.

        Raises:
            ValueError: for system prompts without a chat template, or a tokenizer without an end token.
        """
        llm, llm_revision = split_revision(os.fspath(llm))
        setup = load_vision_setup(
            vision,
            vision_feature_layer,
            vision_feature_select,
            scales,
            scale_join,
            tiles,
            image_processor_options,
            **hub_kwargs,
        )
        tokenizer = AutoTokenizer.from_pretrained(llm, revision=llm_revision, **hub_kwargs)
        num_visual_tokens = num_queries if connector == "qformer" else setup.num_patches
        try:
            generation_eos = GenerationConfig.from_pretrained(llm, revision=llm_revision, **hub_kwargs).eos_token_id
        except OSError:  # many base models have no generation config
            generation_eos = None
        generation_eos = generation_eos if isinstance(generation_eos, list) else [generation_eos]
        end = end_of_answer_id(tokenizer, [e for e in generation_eos if e is not None])
        if getattr(tokenizer, "add_eos_token", False):
            tokenizer.add_eos_token = False  # a prompt must not end in EOS
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(end)  # masks do not depend on its id
        chat = tokenizer.chat_template
        image_token, _ = pick_image_token(tokenizer)
        video_token = pick_video_token(tokenizer)[0] if frames is not None else None
        num_video_tokens = num_visual_tokens
        if frames is not None and (frame_tokens or connector == "patches"):
            num_video_tokens = frames * num_visual_tokens
        tokenizer.chat_template = None  # the processor has one that places images
        answer_start = "" if chat or prompts == [""] else " "
        if system_prompts and not chat:
            raise ValueError(f"{llm} has no chat template, so it takes no system prompts")
        return cls(
            setup.image_processor,
            tokenizer,
            chat_template=build_chat_template(chat, image_token, answer_start, video_token),
            image_token=image_token,
            video_token=video_token,
            frames_per_video=frames,
            num_video_tokens=num_video_tokens if frames is not None else None,
            frame_times=frames is not None and time_embedding == "seconds",
            num_visual_tokens=num_visual_tokens,
            answer_end=tokenizer.convert_ids_to_tokens(end),
            answer_start=answer_start,
            prompts=prompts or [DEFAULT_CHAT_PROMPT if chat else DEFAULT_PROMPT],
            system_prompts=system_prompts,
        )

    @property
    def video_processor(self) -> BliprenVideoProcessor:
        """Video processor: the frames of a video through the image processor."""
        return BliprenVideoProcessor(self.frames_per_video, self.image_processor, self.frame_times)

    def __call__(
        self, images: ImageInput | None = None, text: str | list[str] | None = None, **kwargs: Unpack[ProcessingKwargs]
    ):
        """Process images and texts as processors of transformers do.

        Text without the placeholder gets the prompt layout of training, see [`prepare_inputs_layout`]. With
        `qformer_reads_prompt` the result also has `qformer_input_ids` and `qformer_attention_mask`, one row an image.
        """
        outputs = super().__call__(images=images, text=text, **kwargs)
        if self.qformer_reads_prompt and images is not None:
            if self.qformer_tokenizer is None:
                raise ValueError(
                    "qformer_reads_prompt needs the tokenizer of the Q-Former, in the folder qformer_tokenizer of the "
                    "checkpoint"
                )
            prompts = self._image_prompts(len(outputs["pixel_values"]), text)
            tokens = self.qformer_tokenizer(
                prompts, padding=True, truncation=True, max_length=512, return_tensors="pt"
            )
            outputs["qformer_input_ids"] = tokens["input_ids"]
            outputs["qformer_attention_mask"] = tokens["attention_mask"]
        return outputs

    def _image_prompts(self, num_images: int, text) -> list[str]:
        """Return the prompt of each image, without placeholders; the caption prompt if there is no text."""
        texts = [text] if text is None or isinstance(text, str) else list(text)
        prompts = []
        for one in texts:
            count = max(1, one.count(self.image_token)) if isinstance(one, str) else 1
            plain = self.prompts[0] if one is None else " ".join(one.replace(self.image_token, " ").split())
            prompts += [plain] * count
        if len(prompts) == 1:
            prompts *= num_images
        if len(prompts) != num_images:
            raise ValueError(f"{len(prompts)} prompts for {num_images} images: give one text, or one for each image")
        return prompts

    # ---- transformers' hooks --------------------------------------------------------------------------------------

    def prepare_inputs_layout(self, images=None, text=None, videos=None, audio=None, **kwargs):
        """Put text without the placeholder into the prompt layout of training; use the caption prompt without text.

        Videos become their sampled frames.

        Raises:
            ValueError: for audio, videos that this model does not take, an image by path or address where only `data:` is
                allowed, or numbers of texts and images that do not fit.
            VideoError: a video cannot be used.
        """
        for name, value in (("videos", None if self.frames_per_video else videos), ("audio", audio)):
            if value is not None:
                kinds = "images, videos and text" if self.frames_per_video else "images and text"
                raise ValueError(f"{name} were given to the processor, and this model reads {kinds} only")
        if videos is not None:
            return self._prepare_videos(images, text, videos, **kwargs)
        single = isinstance(text, str)
        if images is not None:
            check_image_sources(images)
            nested = isinstance(images, (list, tuple)) and bool(images) and isinstance(images[0], (list, tuple))
            flat = isinstance(images, (list, tuple)) and not nested
            if text is None:
                texts = [None] * (len(images) if nested or flat else 1)
            else:
                texts = [text] if single else list(text)
            if nested:
                counts = [len(group) for group in images]
            elif flat:
                counts = [len(images)] if len(texts) == 1 else [1] * len(images)
            else:
                counts = [1]
            if not any(isinstance(t, str) and self.image_token in t for t in texts):
                if len(counts) != len(texts):
                    raise ValueError(
                        f"{len(texts)} texts and {len(counts)} images: give one text, or one for each image, "
                        "or a list of images for each text"
                    )
                texts = [self.prompt_text(t, num_images=n) if n else t for t, n in zip(texts, counts)]
            text = texts
        if text is not None:
            # apply_chat_template passes add_special_tokens=False if its template has written BOS
            given = kwargs.get("add_special_tokens", kwargs.get("text_kwargs", {}).get("add_special_tokens", True))
            texts = [text] if isinstance(text, str) else list(text)
            text = [self._strip_duplicate_bos(t) for t in texts] if given else texts
        return super().prepare_inputs_layout(images=images, text=text, videos=videos, audio=audio, **kwargs)

    def _prepare_videos(self, images, text, videos, **kwargs):
        """Return images, texts and the sampled frames of videos; a text without placeholders has its videos in front."""
        if self.qformer_reads_prompt:
            raise ValueError("a Q-Former that reads the prompt takes images only")
        check_image_sources(videos)
        if isinstance(videos, (list, tuple)) and videos and all(map(holds_videos, videos)):
            groups = [list(group) for group in videos]  # the videos of each text
        elif isinstance(text, str):
            groups = [as_videos(videos)]
        else:
            groups = [[video] for video in as_videos(videos)]
        texts = [None] * len(groups) if text is None else [text] if isinstance(text, str) else list(text)
        if not any(isinstance(t, str) and (self.video_token in t or self.image_token in t) for t in texts):
            pictures = [[] for _ in texts]
            if images is not None:
                listed = images if isinstance(images, (list, tuple)) else [images]
                pictures = [list(one) if isinstance(one, (list, tuple)) else [one] for one in listed]
            if not len(texts) == len(groups) == len(pictures):
                raise ValueError(
                    f"{len(texts)} texts, {len(groups)} groups of videos, {len(pictures)} of images: give a list for each text"
                )
            texts = [
                self.prompt_text(t, num_images=len(p), num_videos=len(g)) if p or g else t
                for t, p, g in zip(texts, pictures, groups)
            ]
        if isinstance(images, (list, tuple)) and all(isinstance(one, (list, tuple)) and not one for one in images):
            images = None
        check_image_sources(images)
        texts = [self._strip_duplicate_bos(t) for t in texts]
        frames = read_videos(sum(groups, []), self.frames_per_video, kwargs.get("video_metadata"))
        images, texts, _, _ = super().prepare_inputs_layout(images=images, text=texts, **kwargs)
        return images, texts, frames, None

    def replace_video_token(self, video_inputs: dict, video_idx: int, **kwargs) -> str:
        """Return the placeholder of a video, repeated for each of its visual tokens."""
        return self.video_token * self.num_video_tokens

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        """Return the placeholder, repeated for each visual token of the image."""
        count = self.num_visual_tokens
        if count is None:
            count = int(image_inputs["pixel_attention_mask"][image_idx].sum())
        return self.image_token * count

    def _get_num_multimodal_tokens(self, image_sizes=None, video_sizes=None, **kwargs) -> MultiModalData:
        """Return the placeholders of images and videos of these sizes, which vLLM asks for."""
        data = {}
        if image_sizes is not None:
            if self.num_visual_tokens is None:
                raise ValueError(
                    "the visual tokens of an image depend on its shape (tiles or NaFlex with the connector `patches`), and "
                    "vLLM needs their number: serve a model with a Q-Former"
                )
            data["num_image_tokens"] = [self.num_visual_tokens] * len(image_sizes)
            data["num_image_patches"] = [1] * len(image_sizes)
        if video_sizes is not None and self.frames_per_video is not None:
            data["num_video_tokens"] = [self.num_video_tokens] * len(video_sizes)
        return MultiModalData(**data)

    def post_process_image_text_to_text(self, generated_outputs, skip_special_tokens=True, **kwargs) -> list[str]:
        """Decode generated ids, for the built-in pipeline."""
        kwargs.pop("clean_up_tokenization_spaces", None)
        return self.tokenizer.batch_decode(generated_outputs, skip_special_tokens=skip_special_tokens, **kwargs)

    def post_process_grounding(self, text: str, size: tuple[float, float]) -> dict:
        """Return the boxes and points of an answer in pixels of the original image.

        Args:
            text: an answer, or any text with `[x1, y1, x2, y2]` and `[x, y]`.
            size: width and height of the image, upright: `image.size` of `load_image`.

        Returns:
            `boxes` (`[x1, y1, x2, y2]` each) with their `labels`, `points` (`[x, y]`) with `point_labels`: a label is the
            words in front, perhaps none. `malformed` is the number of groups in brackets that are neither.
        """
        found = read_places(text)
        return {
            "boxes": [to_pixels(box, size) for box in found.boxes],
            "labels": found.labels,
            "points": [to_pixels(point, size) for point in found.points],
            "point_labels": found.point_labels,
            "malformed": found.malformed,
        }

    def to_dict(self) -> dict:
        output = super().to_dict()
        output["auto_map"] = {"AutoProcessor": AUTO_MAP["AutoProcessor"]}
        return output

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        folder = Path(save_directory)
        copy_code_files(folder)
        if self.qformer_tokenizer is not None:
            self.qformer_tokenizer.save_pretrained(folder / QFORMER_TOKENIZER)
        if self.frames_per_video is not None:
            self.video_processor.save_pretrained(folder)
        kind, auto_class = type(self), self._auto_class
        # the code is written already; transformers would also write the auto_map of tokenizer and image processor
        kind._auto_class = None
        try:
            return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        finally:
            kind._auto_class = auto_class

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        processor = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        hub_keys = ("cache_dir", "local_files_only", "token", "revision")
        hub_kwargs = {key: kwargs[key] for key in hub_keys if key in kwargs}
        if isinstance(processor, tuple):  # return_unused_kwargs
            return processor
        folder = Path(str(pretrained_model_name_or_path)) / QFORMER_TOKENIZER
        if folder.is_dir():
            processor.qformer_tokenizer = AutoTokenizer.from_pretrained(folder)
        elif not Path(str(pretrained_model_name_or_path)).is_dir():
            try:
                processor.qformer_tokenizer = AutoTokenizer.from_pretrained(
                    pretrained_model_name_or_path, subfolder=QFORMER_TOKENIZER, **hub_kwargs
                )
            except (OSError, ValueError):  # only checkpoints of stage 1 have one
                processor.qformer_tokenizer = None
        return processor


__all__ = ["BliprenProcessor"]
